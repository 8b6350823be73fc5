"""The command line and the file that says what its options are for."""

import inspect

from llavakd import cli


def test_every_description_belongs_to_a_parameter():
    functions = [value for value in vars(cli).values() if getattr(value, "__module__", "") == cli.__name__]
    parameters = {function.__name__: set(inspect.signature(function).parameters) for function in functions}
    for section, texts in cli.OPTIONS.items():
        known = set.union(*parameters.values()) if section == "any" else parameters[section]
        assert set(texts) <= known, section
