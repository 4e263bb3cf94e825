import pytest

from datasets_code import DataError, MissingDataError, WikiText2
from datasets_code.hub import HubRows, HubUnavailable
from datasets_code.sources import SAMPLES

FILE = " \n = A Title = \n \n One line , then \r\n a second . \n"
HUB = ["", " = A Title = \n", "", " One line , then \n", " a second . \n"]
TEXT = "\n\n".join(HUB)


def write(folder, text=FILE, name="raw/wiki.test.raw"):
    path = folder / "wikitext-2" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def no_hub(_source, _split):
    raise HubUnavailable("the hub is out of reach")


@pytest.mark.parametrize("name", ["raw/wiki.test.raw", "wiki.test.raw"])
def test_the_official_file_gives_the_hub_s_text(tmp_path, name):
    loaded = WikiText2().load(write(tmp_path, name=name))
    assert (loaded.text, loaded.source, loaded.note) == (TEXT, f"data_dir:{tmp_path / 'wikitext-2'}", "")


def test_a_last_line_without_an_end_counts_too(tmp_path):
    assert WikiText2().load(write(tmp_path, FILE.rstrip("\n"))).text == TEXT


def test_the_hub_gives_the_same_text():
    asked = []

    def fetch(source, split):
        asked.append((source.repo, source.pattern(split)))
        return HubRows([{"text": text} for text in HUB], "abc123")

    loaded = WikiText2(fetch).load()
    assert (loaded.text, loaded.source) == (TEXT, "hub:Salesforce/wikitext@abc123")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1/test/*.parquet")]


def test_without_a_hub_the_own_sample_is_read_and_said():
    loaded = WikiText2(no_hub).load()
    assert (loaded.source, loaded.note) == ("samples", "the hub is out of reach")
    assert len(loaded.text.split()) > 1000
    assert loaded.text == WikiText2().load(SAMPLES).text.replace("\r", "")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MissingDataError, match="is not a folder"):
        WikiText2().load(tmp_path / "absent")
    with pytest.raises(MissingDataError, match="no folder 'wikitext-2'.*out of --perplexity"):
        WikiText2().load(tmp_path)
    (tmp_path / "wikitext-2").mkdir()
    with pytest.raises(MissingDataError, match="wiki.test.raw not found.*raw/wiki.test.raw"):
        WikiText2().load(tmp_path)
    with pytest.raises(DataError, match="wikitext-2: the hub is out of reach. Give the official files"):
        WikiText2(no_hub).load(source="hub")
    with pytest.raises(ValueError, match="source 'web'"):
        WikiText2().load(source="web")


@pytest.mark.parametrize("content", ["", " \n \n", "\n"])
def test_a_blank_file_is_refused(tmp_path, content):
    with pytest.raises(DataError, match="holds no text"):
        WikiText2().load(write(tmp_path, content))


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    with pytest.raises(DataError, match="wiki.test.raw:2: not UTF-8"):
        WikiText2().load(write(tmp_path, b" ok \n\xff\n"))


@pytest.mark.parametrize("row", [{}, {"text": None}, "text"])
def test_rows_of_another_form_are_refused(row):
    with pytest.raises(DataError, match="row 0 has no field 'text'"):
        WikiText2(lambda *_: HubRows([row], "abc123")).load()
