from hf_poprisk.leave_one_out.command import main

main()
