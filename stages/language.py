"""Stage 0 of small runs: teach a stand-in language model to read and answer, on text alone.

The paper starts from Qwen2.5-0.5B-Instruct, which has read the internet. A run that learns everything in minutes
needs a language model that has read *something*: a `Qwen2ForCausalLM` of a few hundred thousand to a few million
parameters and a BPE tokenizer with Qwen's special tokens, both learnt here from the same kind of text that the
conversations hold. Later stages load the result by path exactly as they load `Qwen/Qwen2.5-0.5B-Instruct`.

    diffclip language --config quickstart/language --text data/scenes/llava/text.jsonl \
        --output_dir runs/language
"""

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.imports import importing
from stages.config import parse, require
from stages.run import Run
from stages.settings import LanguageConfig


def main(argv: list[str] | None = None) -> None:
    """Train tokenizer and model; write a directory for `AutoTokenizer` and `AutoModelForCausalLM`."""
    config = parse(LanguageConfig, __doc__, argv)
    if config.dry_run:
        raise InputError("language has no dry run, since it trains in minutes: leave out --dry_run")
    require(config, "output_dir")
    if not (config.text or config.conversations):
        raise InputError("nothing to read: give --text FILE.jsonl, --conversations FILE.json, or both")
    names = ("conversations", "vocabulary_from", "text")
    with Run("language", config, {name: getattr(config, name) for name in names}) as run:
        if not run.finished:
            with importing():
                from stages.language_modeling import train_language_model

            train_language_model(config, run)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
