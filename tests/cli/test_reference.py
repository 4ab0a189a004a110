"""Laws of docs/config.md: it is in step with the config classes, and `--help` prints a command's part of it."""

from cli.common import PAGE, fields_help
from cli.reference import config_class, jobs, render
from infra.fields import walk


def test_the_page_of_all_fields_is_in_step_with_the_config_classes() -> None:
    written, made = PAGE.read_text(encoding="utf-8").splitlines(), render().splitlines()
    changed = sorted({*written} ^ {*made})[:10]
    assert written == made, "run `make docs`; these lines differ:\n" + "\n".join(changed)


def test_every_field_says_what_it_means_and_what_is_legal() -> None:
    for title, target in jobs():
        for field in walk(config_class(target)):
            assert field.meaning, f"{title}: give {field.name} a docstring in its config class"
            assert field.legal == field.legal.lower() or "|" in field.legal, (title, field.name, field.legal)


def test_help_lists_the_fields_of_the_commands_config() -> None:
    for title, target in jobs():
        told = fields_help(" ".join(title.split()[:2]))
        for field in walk(config_class(target)):
            assert f"\n  {field.name}  {field.legal}" in told, (title, field.name)
