from diffclip.base.errors import exit_on_input_error
from stages.report import main

if __name__ == "__main__":
    with exit_on_input_error():
        main()
