"""Ablation tables: a YAML file whose rows each set a few fields of one recipe otherwise."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation.protocols import MSEE
from .arguments import check_known_fields, read_recipe


# Keys of the file and of one of its rows, each with its type in YAML.
FILE_KEYS: dict[str, type] = {
    "title": str,
    "recipe": str,
    "seeds": list,
    "columns": list,
    "rows": list,
    "overrides": dict,
    "paper_protocol": str,
}
ROW_KEYS: dict[str, type] = {"name": str, "overrides": dict, "paper": dict}
OPTIONAL_KEYS = ("overrides", "paper", "paper_protocol")
TYPE_NAMES: dict[type, str] = {str: "text", list: "a list", dict: "a mapping"}
# The command sets these for every run.
OWN_FIELDS = {"output_dir": "--output", "seed": "--seeds"}


@dataclass(frozen=True)
class AblationRow:
    """One row: recipe fields and the paper's figures in percent by column.

    `folder` is its name as part of a path.
    """

    name: str
    overrides: dict[str, Any]
    paper: dict[str, float]
    folder: str


@dataclass(frozen=True)
class Ablation:
    """A table.

    Args:
        path: the file.
        title: what it varies.
        recipe: path of the recipe that all rows share.
        seeds: seeds of every row.
        columns: what is printed, of "CAM", "Auxiliary CAM" and "Seg".
        overrides: recipe fields that all rows set.
        paper_protocol: what the paper's figures were measured on and how.
        rows: the first one is what the others are compared with.
    """

    path: str
    title: str
    recipe: str
    seeds: list[int]
    columns: list[str]
    overrides: dict[str, Any]
    paper_protocol: str
    rows: list[AblationRow]


def read_ablation(path: str) -> Ablation:
    """Read and check a table.

    Raises:
        ValueError: a key or recipe field that does not exist, one that is missing, a value of another type, two rows
            of one name; the message names it.
        FileNotFoundError: no such file.
    """
    values = read_recipe(path)
    _check_keys(values, FILE_KEYS, path)
    columns, seeds = values["columns"], values["seeds"]
    scored = bool(columns) and all(column in MSEE.row_names for column in columns)
    _expect(scored, f"{path}: columns", f"some of {', '.join(MSEE.row_names)}", columns)
    check_seeds(seeds, f"{path}: seeds")
    rows = [_row(row, columns, f"{path}: row {number}") for number, row in enumerate(values["rows"])]
    _expect(bool(rows), f"{path}: rows", "at least one row", rows)
    folders = [row.folder for row in rows]
    _expect(len(set(folders)) == len(folders), f"{path}: rows", "names that differ in letters or digits", folders)
    overrides = values.get("overrides", {})
    _check_overrides(overrides, path)
    return Ablation(
        path=path,
        title=values["title"],
        recipe=values["recipe"],
        seeds=seeds,
        columns=columns,
        overrides=overrides,
        paper_protocol=values.get("paper_protocol", ""),
        rows=rows,
    )


def check_seeds(seeds: list[Any], where: str) -> None:
    """Raise ValueError unless these are whole numbers from 0, none twice."""
    whole = all(type(seed) is int and seed >= 0 for seed in seeds)
    _expect(bool(seeds) and whole and len(set(seeds)) == len(seeds), where, "whole numbers from 0, none twice", seeds)


def _row(values: Any, columns: list[str], where: str) -> AblationRow:
    _expect(isinstance(values, dict), where, "a mapping with a name and overrides", values)
    _check_keys(values, ROW_KEYS, where)
    where = f"{where} ({values['name']})"
    overrides, paper = values.get("overrides", {}), values.get("paper", {})
    _check_overrides(overrides, where)
    for column, figure in paper.items():
        _expect(column in columns, f"{where}: paper", f"columns of {', '.join(columns)}", column)
        _expect(type(figure) in (int, float), f"{where}: paper: {column}", "a number in percent", figure)
    folder = re.sub(r"[^a-z0-9.]+", "-", values["name"].lower()).strip("-.")
    _expect(bool(folder), f"{where}: name", "at least one letter or digit", values["name"])
    return AblationRow(values["name"], overrides, paper, folder)


def _check_overrides(overrides: Mapping[str, Any], where: str) -> None:
    check_known_fields(overrides, where)
    for name in overrides:
        _expect(name not in OWN_FIELDS, f"{where}: overrides", f"no {name!r}, which the command sets", name)


def _check_keys(values: Mapping[str, Any], keys: Mapping[str, type], where: str) -> None:
    """Raise ValueError for an unknown, missing or mistyped key."""
    for name, value in values.items():
        _expect(name in keys, where, f"keys of {', '.join(keys)}", name)
        _expect(isinstance(value, keys[name]), f"{where}: {name}", TYPE_NAMES[keys[name]], value)
    for name in keys:
        if name not in values and name not in OPTIONAL_KEYS:
            raise ValueError(f"{where}: the key {name!r} is missing.")


def _expect(holds: bool, where: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {got!r}.")
