"""`python -m llama_adapter.cli`: the command line without its script."""

from llama_adapter.cli.app import main

main()
