"""The files of a data set, in a folder or in an archive, and the one error for files that are not what they should be.

What tools leave behind in a folder is passed over, and links to folders cannot lead in a circle."""
import gzip
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

AGAIN = "replace it by a whole copy"
TOOLS = "__macosx", "__pycache__", "cvs", "lost+found", "system volume information", "thumbs.db", "desktop.ini"


class BrokenData(ValueError):
    "A data file that is not what it should be."


def left_behind(name: str) -> bool:
    "Whether a file or folder is hidden or a tool's own, such as .ipynb_checkpoints, @eaDir, $RECYCLE.BIN or __MACOSX."
    return name.startswith((".", "@", "#", "$", "~")) or name.lower() in TOOLS


def walk(folder: Path, root: Path | None = None) -> list[str]:
    """The files below a folder, sorted by folder and then by name.

    A link to a folder is followed once, and only out of `root` (by default the folder itself): whatever lies inside is
    met anyway. A link to a file that does not exist is listed, so that it is missed when it is read. `BrokenData` where
    a folder cannot be listed."""
    folder, home = Path(folder), os.path.realpath(root or folder)
    seen, found, waiting = set(), [], [str(folder)]
    while waiting:
        at = waiting.pop()
        if (real := os.path.realpath(at)) in seen: continue
        seen.add(real)
        try: names = [n for n in os.listdir(at) if not left_behind(n)]
        except OSError as e: raise BrokenData(f"{at} cannot be listed ({e.strerror}); allow reading it.") from None
        for path in (os.path.join(at, n) for n in names):
            if os.path.isdir(path):
                if not os.path.islink(path) or leads_out(path, home): waiting.append(path)
            elif os.path.isfile(path) or not os.path.exists(path): found.append(path)
    return sorted(found, key=os.path.split)


def leads_out(link: str, home: str) -> bool:
    "Whether a link to a folder leads neither into `home` (a real path) nor to a folder that holds it."
    target = os.path.realpath(link)
    return os.path.commonpath([target, home]) not in (target, home)


def subfolders(folder: Path) -> list[str]:
    "The names of the folders in a folder, without those that tools left behind and links that lead back into it."
    home = os.path.realpath(folder)
    return sorted(o.name for o in Path(folder).iterdir()
                  if not left_behind(o.name) and o.is_dir() and (not o.is_symlink() or leads_out(str(o), home)))


def tree_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    "Name, relative to the folder, and content of every file below it; `BrokenData` for a file that cannot be read."
    for path in walk(folder):
        try: yield Path(path).relative_to(folder).as_posix(), Path(path).read_bytes()
        except OSError as e: raise BrokenData(f"{path} cannot be read ({e.strerror}); {AGAIN}.") from None


def archive_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a .tgz; `BrokenData` where it is cut off.

    The archive is never unpacked: 60,000 small files are slow to write and slower to read again. Reading on to its
    end, past the last file, lets gzip compare its checksum."""
    try:
        with gzip.open(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
            for member in tar:
                if member.isfile() and not any(map(left_behind, Path(member.name).parts)):
                    yield member.name, tar.extractfile(member).read()
            while unzipped.read(2**20): pass
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        raise BrokenData(f"{archive} is cut off or damaged; {AGAIN}, "
                         "or delete it to have it downloaded again.") from None


def own_folder(folder: Path, name: str, marks: Iterable[str]) -> Path:
    """Where a data set lies: in `folder/name`, or in `folder` itself where that holds all of `marks`.

    So $BNONLY_DATA may name the data set's own folder as well as the one around it."""
    own = not (folder/name).exists() and all((folder/m).exists() for m in marks)
    return folder if own else folder/name
