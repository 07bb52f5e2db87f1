"python -m bnonly"
from .cli import main

main()
