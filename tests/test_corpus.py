"""Reading text: every kind of source, stable names, bounded parts, a split that never moves, errors that say where."""

import io
import json
import sys

import pytest

from fasttrain import corpus
from fasttrain.corpus import CorpusFile, Document, list_files, read_documents, split_documents


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    for name, text in {"b.txt": "second\r\n", "a/z.md": "first", "a/empty.txt": "", ".hidden": "no",
                       ".git/config": "no", "__pycache__/x.pyc": "no"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def _jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def _pairs(source):
    return [(document.name, document.text) for document in read_documents(source)]


def _splits(files, val_fraction=0.3, seed=0):
    pairs = split_documents(files, val_fraction=val_fraction, seed=seed)
    return {document.name: split for split, document in pairs}


def test_a_folder_is_read_recursively_sorted_and_without_hidden_or_empty_files(folder):
    assert _pairs(folder) == [("a/z.md", "first"), ("b.txt", "second\r\n")]


def test_names_do_not_depend_on_where_the_corpus_lies(folder, tmp_path, monkeypatch):
    absolute = _pairs(folder)
    monkeypatch.chdir(tmp_path)
    assert _pairs("texts") == absolute == _pairs(["texts/"])


def test_a_file_a_glob_and_a_list_of_sources(folder):
    assert _pairs(folder / "b.txt") == [("b.txt", "second\r\n")]
    assert _pairs(f"{folder}/**/*.md") == [("a/z.md", "first")]
    assert _pairs([folder / "b.txt", f"{folder}/*/*.md"]) == [("b.txt", "second\r\n"), ("a/z.md", "first")]


def test_a_path_that_exists_is_never_taken_for_a_pattern(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("no")
    assert _pairs(tmp_path / "a[1].txt") == [("a[1].txt", "brackets")]


def test_jsonl_fields_by_default_by_name_in_globs_and_in_folders(tmp_path):
    path = _jsonl(tmp_path / "x.jsonl", {"text": "one", "body": "two"}, "", {"text": "", "body": "three"})
    texts = lambda source: [document.text for document in read_documents(source)]  # noqa: E731
    assert texts(path) == texts(tmp_path) == ["one"]
    assert texts(f"{path}:body") == texts(f"{tmp_path}/*.jsonl:body") == ["two", "three"]


def test_standard_input_is_one_document(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("häl\r\nlo".encode()), encoding="latin-1"))
    assert _pairs("-") == [("stdin", "häl\r\nlo")]


def test_spooled_standard_input_is_kept_once_for_one_content(tmp_path, monkeypatch):
    stamps = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
        stamps.append(corpus.spool_stdin(tmp_path).stamp())
    assert stamps[0] == stamps[1]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"text"]


def test_the_standard_library_is_megabytes_of_python_in_a_fixed_order_without_tests_or_installed_packages():
    files = list_files("stdlib")
    names = [file.name for file in files]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"json/decoder.py", "ast.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    banned = {"test", "tests", "site-packages", "dist-packages", "lib2to3"}
    assert not any(banned & set(name.split("/")) for name in names)
    sizes = [len(document.text.encode()) for document in read_documents("stdlib")]
    assert sum(sizes) == sum(file.path.stat().st_size for file in files) > 5_000_000


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 7, 64])
def test_a_long_file_comes_in_parts_that_join_to_the_text(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(corpus, "PART_BYTES", part_bytes)
    text = "häl\nlö 漢字\r\n🙂 and a line without end " * 3
    (tmp_path / "long.txt").write_bytes(text.encode())
    parts = list(read_documents(tmp_path / "long.txt"))
    assert "".join(part.text for part in parts) == text
    assert [part.part for part in parts] == list(range(len(parts)))
    assert part_bytes == 64 or len(parts) > 3
    for part in parts:
        assert len(part.text.encode()) <= 2 * part_bytes + 3


def test_parts_end_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 20)
    (tmp_path / "lines.txt").write_text("0123456\n" * 9)
    assert all(part.text.endswith("\n") for part in read_documents(tmp_path / "lines.txt"))


def test_adding_documents_moves_no_other(tmp_path):
    for index in range(60):
        (tmp_path / f"{index:03}.txt").write_text("x")
    before = _splits(list_files(tmp_path))
    for index in range(60):
        (tmp_path / f"{index:03}-new.txt").write_text("x")
    after = _splits(list_files(tmp_path))
    assert {name: after[name] for name in before} == before
    assert 0.15 < sum(split == "val" for split in after.values()) / len(after) < 0.45
    assert _splits(list_files(tmp_path), seed=1) != after
    grown = _splits(list_files(tmp_path), val_fraction=0.6)  # validation only grows with the fraction
    assert all(grown[name] == "val" for name, split in after.items() if split == "val")


def test_a_jsonl_line_put_in_between_moves_no_other_and_copies_share_a_split(tmp_path):
    rows = [{"text": f"document {index}"} for index in range(50)]
    before = _splits(list_files(_jsonl(tmp_path / "x.jsonl", *rows)))
    after = _splits(list_files(_jsonl(tmp_path / "x.jsonl", {"text": "new"}, *rows[:20], rows[3], *rows[20:])))
    assert len(before) == 50 and len(after) == 51
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("part_bytes", [5, 40, 1 << 20])
@pytest.mark.parametrize("text", ["one line\n" * 41, "é" * 100, "short\n" + "x" * 500])
def test_a_single_text_file_is_divided_inside_at_a_line(tmp_path, monkeypatch, text, part_bytes):
    monkeypatch.setattr(corpus, "PART_BYTES", part_bytes)
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    joined = {"train": "", "val": ""}
    numbers = {"train": [], "val": []}
    for split, document in split_documents(list_files(tmp_path / "input.txt"), val_fraction=0.25, seed=0):
        joined[split] += document.text
        numbers[split].append(document.part)
    assert joined["train"] + joined["val"] == text
    assert 0.15 < len(joined["val"]) / len(text) < 0.3
    if "\n" in text[-200:] and part_bytes > 9:  # a line longer than a part is divided at a character
        assert joined["train"].endswith("\n")
    assert all(parts == list(range(len(parts))) for parts in numbers.values())


@pytest.mark.parametrize("content, message", [
    (b"ok\n\xff", r"bad\.txt is not UTF-8 text \(byte 3: invalid start byte\)"),
    ("漢".encode()[:2], r"bad\.txt is not UTF-8 text \(byte 0: unexpected end of data\)"),
    ("é".encode() * 7 + b"\xc3(", r"byte 14: invalid continuation byte"),
])
def test_a_file_that_is_no_text_is_named_with_the_byte(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(corpus, "PART_BYTES", 3)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / "bad.txt"))


@pytest.mark.parametrize("line, message", [
    ("{oops", r"x\.jsonl:2 is not JSON"),
    ("[1]", r"x\.jsonl:2 holds a list"),
    ('{"body": "x", "id": 3}', r"x\.jsonl:2 has no field 'text' \(it has 'body', 'id'\); name the one"),
    ('{"text": 3}', r"x\.jsonl:2: field 'text' is a int; it must be a string"),
    ('{"text": "\\ud800"}', r"x\.jsonl:2: field 'text' is not text"),
])
def test_a_bad_jsonl_line_is_named_by_file_and_line(tmp_path, line, message):
    path = _jsonl(tmp_path / "x.jsonl", {"text": "fine"}, line)
    with pytest.raises(ValueError, match=message):
        list(read_documents(path))


def test_what_is_missing_or_empty_is_refused_at_once_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' does not exist; give a file, a folder, a glob, path\.jsonl:field"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"x\.jsonl:text' does not exist"):
        read_documents(f"{tmp_path}/x.jsonl:text")
    with pytest.raises(ValueError, match="no file matches"):
        read_documents(f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match="holds no files"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="empty list"):
        read_documents([])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"no text: 1 file\(s\), all empty \(first: .*empty\.txt\)"):
        list(read_documents(tmp_path))
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="val_fraction"):
            list(split_documents([CorpusFile("a", tmp_path / "empty.txt")], val_fraction=fraction, seed=0))


def test_documents_stream(tmp_path):
    """The first document is there before the second file is even opened."""
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    documents = read_documents(tmp_path)
    assert next(documents) == Document("a.txt", "first")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        next(documents)
