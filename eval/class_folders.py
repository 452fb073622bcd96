"""Reads pictures in a folder per class, as ImageNet's validation set is laid out, and the names of the classes.

val/n01440764/ILSVRC2012_val_00000293.JPEG        classes.json: {"n01440764": "tench", ...}
"""

import json
from dataclasses import dataclass
from pathlib import Path

from encoder.errors import DataError

SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class ClassFolders:
    """folders: in sorted order, numbers by their value, which is ImageNet's own; names: what each is called, in the same order,
    perhaps twice the same; images: (path relative to the root, index of its folder), folder by folder."""

    root: Path
    folders: list[str]
    names: list[str]
    images: list[tuple[str, int]]


def read_class_folders(root: Path, names_file: Path | None) -> ClassFolders:
    """Lists the pictures below `root`. Raises DataError where there are none, or a file there is no picture.

    names_file: see `read_names`; None: the folders' own names, underscores as blanks
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the one that holds a folder of pictures per class as --images")
    folders = [path.name for path in root.iterdir() if path.is_dir()]
    # Those of ImageNet-V2 are called 0 to 999: by their texts 10 would come before 2, and a list of names would be shifted.
    folders.sort(key=int if all(map(str.isdecimal, folders)) else None)
    images = []
    for index, folder in enumerate(folders):
        found = sorted(path for path in (root / folder).rglob("*") if path.is_file())
        for path in found:
            if path.suffix.lower() not in SUFFIXES:
                raise DataError(f"{path} is not one of {', '.join(sorted(SUFFIXES))}; remove it from the folder of its class")
        if not found:
            raise DataError(f"{root / folder} holds no picture; remove the folder, or put the class's pictures into it")
        images += [(str(path.relative_to(root)), index) for path in found]
    if not images:
        raise DataError(f"{root} holds no folder of pictures; one folder per class was expected")
    if names_file is None:
        return ClassFolders(root, folders, [folder.replace("_", " ") for folder in folders], images)
    return ClassFolders(root, folders, read_names(names_file, folders), images)


def read_names(path: Path, folders: list[str]) -> list[str]:
    """The name of each folder's class. Raises DataError for a form not known, and for a folder without a name.

    A JSON object `folder: name`, or `index: [folder, name]` (imagenet_class_index.json; folders may be called by the index,
    as in ImageNet-V2); a JSON list of names in the
    order of the sorted folders (OpenAI's ImageNet names); or lines of text `folder name`, of whose synonyms, parted by
    commas, the first counts (LOC_synset_mapping.txt).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else None
    except FileNotFoundError:
        raise DataError(f"{path} is not there; give a file with the names of the classes as --names") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); write it again") from None
    if isinstance(content, list):
        if len(content) != len(folders) or not all(isinstance(name, str) for name in content):
            raise DataError(f"{path}: a list of {len(content)}, there are {len(folders)} folders; give a name for each of them")
        return content
    if isinstance(content, dict):
        pairs = [(key, value[-1] if isinstance(value, list) and value else value) for key, value in content.items()]
        pairs += [tuple(value) for value in content.values() if isinstance(value, list)]
    elif content is None:
        rows = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
        pairs = [(row[0], row[1].partition(",")[0].strip() if len(row) == 2 else None) for row in rows]
    else:
        raise DataError(f"{path}: holds a JSON {type(content).__name__}; an object or a list of names was expected")
    named = {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and isinstance(pair[1], str)}
    nameless = [folder for folder in folders if folder not in named]
    if nameless:
        raise DataError(f"{path}: no name for {len(nameless)} of {len(folders)} folders, the first is {nameless[0]}; add it")
    return [named[folder] for folder in folders]
