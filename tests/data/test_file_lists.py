"""Lists of paths, and lists of classes: every supported format, and the refused ones."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from inbatch.data import open_data, splits
from inbatch.errors import DataError
from inbatch.training.holdout import evaluation_split
from inbatch.training.resolve import resolve_recipe


def photos(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 10 * i).save(root / name, "PNG")
    return root


def listed(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / name


def paths(source):
    return [source.identity(i) for i in range(len(source))]


def named(source):
    return [source.classes[label] if label >= 0 else None for label in source.labels.tolist()]


class TestTables:
    @pytest.mark.parametrize("head", ["path,label", "Label,FILENAME", "id,file_name,class", "image,target,score"])
    @pytest.mark.parametrize("name", ["l.csv", "l.TSV"])
    def test_columns(self, head, name, tmp_path):
        photos(tmp_path, "a/1.png", "b, c/2.png")
        separator = "\t" if name == "l.TSV" else ","
        columns = head.split(",")
        rows = [columns]
        for path, label in (("b, c/2.png", "dog"), ("a/1.png", "cat"), ("a/1.png", "")):
            values = {"path": path, "label": label, "other": "7"}
            what = {"label": "label", "class": "label", "target": "label", "id": "other", "score": "other"}
            rows.append([f'"{values[what.get(c.lower(), "path")]}"' for c in columns])
        source = open_data(listed(tmp_path, name, "\n".join(separator.join(row) for row in rows) + "\n\n"))
        assert paths(source) == ["b, c/2.png", "a/1.png", "a/1.png"] and source.classes == ("cat", "dog")
        assert named(source) == ["dog", "cat", None] and source.image(0)[0, 0, 0] == 10
        assert source.channels == 3 and open_data(tmp_path / name, channels=1).image(0).shape == (1, 4, 4)

    def test_header_without_a_known_column_is_refused(self, tmp_path):
        for head in ("photo,animal", "photo"):
            file = listed(tmp_path, "l.csv", f"{head}\n{'1.png,cat' if ',' in head else '1.png'}\n")
            with pytest.raises(DataError, match=r"has the columns .photo.*with image_column"):
                open_data(file)
        named = open_data(listed(tmp_path, "l.csv", "photo,animal\n1.png,cat\n"), image_column="photo")
        assert paths(named) == ["1.png"]

    def test_table_without_a_header(self, tmp_path):
        assert open_data(listed(tmp_path, "l.csv", "1.png\n2.png\n")).labels.tolist() == [-1, -1]
        source = open_data(listed(tmp_path, "l.csv", "1.png,3\n2,-1\n3.png,\n4.png,0"))
        assert source.labels.tolist() == [1, -1, -1, 0] and source.classes == ("0", "3") == tuple(map(str, source.ids))
        assert paths(source)[1] == "2"  # with any file name
        with pytest.raises(DataError, match="has 3 columns: name them in its first line: path, label, split"):
            open_data(listed(tmp_path, "l.csv", "1.png,3,train\n"))

    def test_splits(self, tmp_path):
        file = listed(tmp_path, "l.csv", "path,label,split\n2,c,val\n3,a,val\n1,b,train\n4,b,train\n5,a,extra\n")
        assert splits(file) == ("train", "val", "extra")
        train, test = open_data(file), open_data(file, "test")
        assert (paths(train), paths(test)) == (["1", "4"], ["2", "3"])
        assert train.classes == test.classes == ("a", "b", "c") and named(test) == ["c", "a"]
        assert test.name == f"{file} (val)"
        with pytest.raises(DataError, match="line 3: the column split is empty"):
            open_data(listed(tmp_path, "l.csv", "path,split\n1,train\n2,\n"))

    @pytest.mark.parametrize("start", ["\n", "\r\n\r\n", "\ufeff\n"])
    def test_splits_below_empty_lines(self, start, tmp_path):
        file = listed(tmp_path, "l.csv", start + "path;label;split\n1;a;train\n2;b;test\n")
        assert splits(file) == ("train", "test")
        assert paths(open_data(file)) == ["1"] and paths(open_data(file, "test")) == ["2"]

    def test_splits_in_several_letter_cases(self, tmp_path):
        text = "path,label,split\n1,a,Train\n2,b,train\n3,a,TEST\n4,b,test\n5,a,other\n6,b,Other\n"
        file = listed(tmp_path, "l.csv", text)
        assert splits(file) == ("train", "test", "other", "Other")
        found = [paths(open_data(file, split)) for split in splits(file)]
        assert found == [["1", "2"], ["3", "4"], ["5"], ["6"]]
        with pytest.raises(DataError, match="'train' and 'training', which both name training images"):
            open_data(listed(tmp_path, "l.csv", "path,split\n1,train\n2,training\n"))

    def test_exports_of_spreadsheets(self, tmp_path):
        """A byte order mark, carriage returns, quoted line breaks and quotes."""
        source = open_data(
            listed(tmp_path, "l.csv", b'\xef\xbb\xbfpath,label\r\n"a\nb.png","say ""x"""\r\nc.png,y\r\n')
        )
        assert paths(source) == ["a\nb.png", "c.png"] and source.classes == ('say "x"', "y")

    def test_spaces_after_commas(self, tmp_path):
        source = open_data(listed(tmp_path, "l.csv", 'label, path\ncat, a b.png\ndog, " c, d.png"\n'))
        assert paths(source) == ["a b.png", " c, d.png"] and source.classes == ("cat", "dog")

    @pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
    def test_names_that_are_not_text(self, tmp_path):
        with open(os.path.join(os.fsencode(tmp_path), b"\xff.png"), "wb") as file:
            Image.new("L", (4, 4), 9).save(file, "PNG")
        source = open_data(listed(tmp_path, "l.csv", b"path,label\n\xff.png,\xfe\n"))
        assert source.identity(0) == "\\xff.png" and source.classes == ("\\xfe",) and source.image(0)[0, 0, 0] == 9

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("path,label\na,1\nb\n", "line 3: 1 columns, the first line has 2"),
            ("path\na,b.png\n", "line 2: 2 columns, the first line has 1; put names with a separator"),
            ('path,label\n"a,1\nb,2\n', "line 3: unexpected end of data"),
            ('path,label\n"a"b,1\n', "line 2: .*expected after"),
            ("path,label\na,0\n,1\n", "line 3: '' is not the name of a file"),
            ("path\na\nb\0c\n", "line 3: 'b\0c' is not the name of a file"),
            ("path\na\n../x.png\n", "line 3: '../x.png' is outside the list's folder"),
            ("path\na/../../x.png\n", "line 2: 'a/../../x.png' is outside"),
            ("path\n..\n", "line 2: '..' is outside"),
            ("path,label\na,0\nb,-2\n", "go down to -2"),
            ("path,label\n", "lists no image"),
            ("path,split\n", "lists no image"),
            ("\n\n", "lists no image"),
            ("", "lists no image"),
            ("path\n" + "x" * 200_000, "line .: field larger than field limit"),
        ],
    )
    def test_invalid_tables_are_refused(self, text, match, tmp_path):
        with pytest.raises(DataError, match=match):
            open_data(listed(tmp_path, "l.csv", text))

    def test_absolute_paths_may_lie_anywhere(self, tmp_path):
        photos(tmp_path, "elsewhere/1.png")
        (tmp_path / "list").mkdir()
        source = open_data(listed(tmp_path / "list", "l.csv", f"{tmp_path}/elsewhere/1.png,x\n"))
        assert source.image(0).shape == (3, 4, 4)

    def test_a_missing_file_is_found_when_it_is_opened(self, tmp_path):
        photos(tmp_path, "1.png")
        source = open_data(listed(tmp_path, "l.csv", "1.png\n2.png\n"))
        assert source.image(0).shape == (3, 4, 4) and source.fingerprint() is None
        with pytest.raises(DataError, match=r"2.png' cannot be read: No such file"):
            source.image(1)

    def test_the_fingerprint_follows_list_and_files(self, tmp_path):
        photos(tmp_path, "1.png", "2.png")
        first = open_data(listed(tmp_path, "l.csv", "1.png\n2.png\n")).fingerprint()
        assert first == open_data(listed(tmp_path, "m.csv", "path,label\n1.png,a\n2.png,b\n")).fingerprint()
        assert first != open_data(listed(tmp_path, "l.csv", "2.png\n1.png\n")).fingerprint()
        Image.new("L", (9, 9)).save(tmp_path / "2.png")
        assert first != open_data(listed(tmp_path, "l.csv", "1.png\n2.png\n")).fingerprint()

    def test_pickled_source_is_small(self, tmp_path):
        source = open_data(listed(tmp_path, "l.csv", "".join(f"{i:09d}\n" for i in range(1000))))
        sent = pickle.dumps(source)
        assert len(sent) < 1000 * (9 + 8 + 8) + 2000 and paths(pickle.loads(sent))[-1] == "000000999"


class TestText:
    def test_paths_alone(self, tmp_path):
        """Names with spaces, commas and substrings that are names of other files."""
        photos(tmp_path, "a b.png", "c,d.PNG", "e.png f.jpeg")
        source = open_data(listed(tmp_path, "l.txt", "a b.png\r\n\r\nc,d.PNG\r\ne.png f.jpeg"))
        assert paths(source) == ["a b.png", "c,d.PNG", "e.png f.jpeg"] and source.classes == ()
        assert source.image(1)[0, 0, 0] == 10

    @pytest.mark.parametrize("separator", ["\t", ",", " ", "  ", ", "])
    def test_labels(self, separator, tmp_path):
        text = "".join(f"{path}{separator}{label}\n" for path, label in (("x y.jpg", 1), ("z.tiff", 0), ("w.png", -1)))
        source = open_data(listed(tmp_path, "l.txt", text + "v.bmp\n"))
        assert paths(source) == ["x y.jpg", "z.tiff", "w.png", "v.bmp"] and source.labels.tolist() == [1, 0, -1, -1]

    def test_names_of_classes(self, tmp_path):
        source = open_data(listed(tmp_path, "l.txt", "1.png tabby cat\n2.png\tdog\n3.png,tabby cat\n"))
        assert named(source) == ["tabby cat", "dog", "tabby cat"] and source.classes == ("dog", "tabby cat")

    def test_invalid_text_lists_are_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"line 2: no name of an image \(.jpg|.*in 'b'; other names can be listed"):
            open_data(listed(tmp_path, "l.txt", "a.png\nb\n"))
        with pytest.raises(DataError, match=r"line 1: '../a.png' is outside"):
            open_data(listed(tmp_path, "l.txt", "../a.png 1\n"))
        with pytest.raises(DataError, match="cannot be opened; data can be"):  # not a list
            open_data(listed(tmp_path, "l.txt", "Dear reader,\n"))


def folder(tmp_path):
    """Write classes a (2 images), b (1), c d (1): two splits."""
    for split in ("train", "val"):
        photos(tmp_path / split, "a/1.png", "a/2.png", "b/3.png", "c d/4.png")
    return tmp_path


class TestClasses:
    def chosen(self, tmp_path, text, split="train"):
        return open_data(folder(tmp_path), split, classes=str(listed(tmp_path, "classes.txt", text)))

    @pytest.mark.parametrize("split", ["train", "test"])
    @pytest.mark.parametrize(
        "text",
        ["b\na\n", b"\xef\xbb\xbfb\r\na\r\n", "# two\n\nb the second, really\n  a,first\n", "b\t2\na\t1", "b\ra\r"],
    )
    def test_list_of_classes_selects_and_numbers(self, text, split, tmp_path):
        source = self.chosen(tmp_path, text, split)
        assert source.classes == ("b", "a") and sorted(zip(paths(source), source.labels.tolist(), strict=True)) == [
            ("a/1.png", 1), ("a/2.png", 1), ("b/3.png", 0)
        ]  # fmt: skip
        assert "3 of 4 used: the 2 classes that" in source.report()

    def test_a_whole_line_comes_first(self, tmp_path):
        assert self.chosen(tmp_path, "c d\n").classes == ("c d",)
        photos(tmp_path, "train/#1/5.png")
        assert open_data(tmp_path, classes=str(listed(tmp_path, "c.txt", "#1\n#2\n"))).classes == ("#1",)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("a\nx\nc\n", r"lacks classes that .* lists: 'x' \(line 2\), 'c' \(line 3\); its classes are "),
            ("\n".join("stuvwxyz"), r"'w' \(line 5\) and 3 more"),
            ("a\nb\na tabby\n", "lists the class 'a' twice, in lines 1 and 3"),
            ("", "is empty"),
            ("# nothing\n", "is empty"),
            (b"\xff\xfe", "cannot be read"),
        ],
    )
    def test_invalid_lists_of_classes_are_refused(self, text, match, tmp_path):
        with pytest.raises(DataError, match=match):
            self.chosen(tmp_path, text)

    def test_list_of_classes_needs_labels_and_a_file(self, tmp_path):
        images = torch.zeros(3, 3, 4, 4).byte()
        file = str(listed(tmp_path, "c.txt", "0\n"))
        with pytest.raises(DataError, match="array has no labels: a list of classes"):
            open_data(images, classes=file)
        with pytest.raises(DataError, match="cannot be read: No such file"):
            open_data((images, [0, 1, 1]), classes=str(tmp_path / "none"))
        with pytest.raises(DataError, match=r"lacks classes that .* lists: '0'"):
            open_data((images, [1, 1, -1]), classes=file)

    def test_list_of_classes_works_for_every_source(self, tmp_path):
        (tmp_path / "l.csv").write_text("1,cat\n2,dog\n3,\n4,cat\n")
        source = open_data(tmp_path / "l.csv", classes=str(listed(tmp_path, "c.txt", "cat\n")))
        assert paths(source) == ["1", "4"] and source.labels.tolist() == [0, 0]
        assert open_data("digits-canvas", classes=str(listed(tmp_path, "c.txt", "7\n3\n"))).classes == ("7", "3")

    def test_evaluation_of_a_run_uses_the_same_classes(self, tmp_path):
        names = listed(tmp_path, "classes.txt", "c d\nb\n")
        recipe, source = resolve_recipe(folder(tmp_path), {"classes": str(names)})
        split = evaluation_split(recipe, source, tmp_path)
        bank, queries, how = split.bank, split.queries, split.description
        assert bank is source and queries.classes == bank.classes == ("c d", "b") and "val split" in how
        assert named(queries) == ["b", "c d"] and queries.name != bank.name


def test_levels_and_channels_are_those_of_the_files(tmp_path):
    scan = np.array([[0, 1000], [2048, 4095]], np.uint16)
    Image.fromarray(scan).save(tmp_path / "scan.png")
    (tmp_path / "list.csv").write_text("path,label\nscan.png,0\n")
    pixels = open_data(tmp_path / "list.csv", channels=1, levels=(0, 4095)).image(0)
    assert pixels[0].flatten().tolist() == [0, 62, 128, 255]
