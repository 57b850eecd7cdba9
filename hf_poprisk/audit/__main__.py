from hf_poprisk.audit.cli import main

main()
