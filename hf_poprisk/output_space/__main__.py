from hf_poprisk.output_space.cli import main

main()
