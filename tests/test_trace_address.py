"""Addresses: what they connect to, and that nobody sees a password."""

import base64
import logging
import traceback

import pytest
from conftest import make_model
from test_trace_access import TEXTS, WRITER, server  # noqa: F401

from steerling_hf.cli import main
from steerling_hf.trace_address import read_address, redacted
from steerling_hf.trace_engine import TraceEngine
from steerling_hf.trace_index import TraceIndex

SECRET = "s3cr3t/p@ss"
pytest.importorskip("pymilvus")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://host:19530", "http://host:19530"),
        (f"http://root:{SECRET}@host:1", "http://root:***@host:1"),
        (f"https://{SECRET}@host", "https://***@host"),
        (f"http://:{SECRET}@host", "http://:***@host"),
        (f"http:/root:{SECRET}@host", "http:/root:***@host"),
        (f"root:{SECRET}@host:1", "root:***@host:1"),
        (f"ftp://ro/ot:{SECRET}@host", "ftp://ro/ot:***@host"),
        ("http://host:1/db?token=s3cr3t&x=s3cr3t", "http://host:1/db?token=***&x=***"),
        ("./a:b@c/index.db", "./a:b@c/index.db"),
        ("/tmp/index.db", "/tmp/index.db"),
        ("index.db", "index.db"),
    ],
)
def test_what_is_shown(uri, shown):
    assert redacted(uri) == shown


def test_a_user_in_the_address_is_the_token():
    address = read_address("http://ro%20ot:p%40ss%25@host:1")
    assert (address.uri, address.token, address.path) == ("http://host:1", "ro ot:p@ss%", None)
    assert read_address("http://key@host").token == "key"
    assert read_address("http://host", "key").token == "key"
    assert SECRET not in repr(read_address(f"http://root:{SECRET}@host"))
    encoded = base64.b64encode(address.token.encode()).decode()
    assert address.hide(f"p@ss% {encoded} {address.token} ro ot") == "*** *** *** ro ot"


@pytest.mark.parametrize(
    ("uri", "token", "error", "message"),
    [
        (5, None, TypeError, "`uri` is a int: give http://host:port"),
        (b"index.db", None, TypeError, "`uri` is a bytes"),
        ("", None, ValueError, "`uri` is ''"),
        ("in\0dex.db", None, ValueError, r"`uri` is 'in\\x00dex.db'"),
        ("http://host\n", None, ValueError, r"`uri` is 'http://host\\n'"),
        (f"http://root:{SECRET}\0@host", None, ValueError, r"`uri` is 'http://root:\*\*\*@host'"),
        (f"root:{SECRET}@host", None, ValueError, r"`uri` is 'root:\*\*\*@host': give"),
        (
            "http://root:x@host",
            "key",
            ValueError,
            r"`token` is given, and `uri` \('http://root:\*\*\*@host'\) names a user",
        ),
        ("http://host", 5, TypeError, "`token` is a int"),
        ("http://host", f"{SECRET}\n", ValueError, "`token` has control characters"),
    ],
)
def test_addresses_that_are_refused(uri, token, error, message):
    with pytest.raises(error, match=message) as caught:
        TraceIndex(uri, token=token)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collection": "../../etc"}, "`collection` is '../../etc': give letters"),
        ({"collection": ""}, "`collection` is ''"),
        ({"collection": "a" * 201}, "`collection` is 'aaa"),
        ({"collection": 5}, "`collection` is 5"),
        ({"timeout": 0}, "`timeout` is 0: give seconds"),
        ({"timeout": "5"}, "`timeout` is '5'"),
        ({"timeout": float("nan")}, "`timeout` is nan"),
        ({"timeout": True}, "`timeout` is True"),
    ],
)
def test_arguments_that_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TraceIndex(tmp_path / "index.db", **arguments)


def told(error: BaseException | None) -> str:
    """All that an error tells, those behind it included."""
    texts: list[str] = []
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            texts += [str(one), repr(one), repr(vars(one))]
            waiting += [one.__cause__, one.__context__]
    return "\n".join(texts)


@pytest.mark.parametrize("given", ["uri", "token"])
def test_no_error_tells_a_password(given, server, tokenizer, caplog, capsys):  # noqa: F811
    caplog.set_level(logging.DEBUG)
    model, place = make_model(), server.uri.removeprefix("http://")
    arguments = {
        "uri": lambda user, host: {"uri": f"http://{user}@{host}"},
        "token": lambda user, host: {"uri": f"http://{host}", "token": user},
    }[given]
    found = []
    for user, host, error in [
        (f"wrong:{SECRET}", place, PermissionError),
        (f"wrong:{SECRET}", "127.0.0.1:9", ConnectionError),
        (f"wrong:{SECRET}", "127.0.0.1:x", (ConnectionError, ValueError)),
    ]:
        with pytest.raises(error) as caught:
            TraceIndex(**arguments(user, host), timeout=1)
        found.append(told(caught.value))
        assert caught.value.__cause__ is caught.value.__context__ is None
    index = TraceIndex(**arguments(WRITER, place))
    index.build(model, tokenizer, TEXTS, progress=False)
    found += [repr(index), index.uri]
    with pytest.raises(ValueError, match="cannot search") as caught:
        index.trace(model, tokenizer, TEXTS[0], where="a ==== 1")
    found.append(told(caught.value))
    server.stop(grace=0)
    with pytest.raises(ConnectionError) as caught:
        len(index)
    found.append(told(caught.value))
    index.close()
    said = "\n".join([*found, caplog.text, *capsys.readouterr()])
    assert SECRET not in said
    assert WRITER.partition(":")[2] not in said


def test_an_error_of_the_engine_stays_its_cause_where_there_is_no_secret(server):  # noqa: F811
    with pytest.raises(PermissionError) as caught:
        TraceIndex(server.uri)
    assert caught.value.__cause__ is not None


def test_words_of_the_engine_are_searched_for_secrets(server):  # noqa: F811
    engine = TraceEngine(server.uri, WRITER, 5, False)
    assert engine._words(ValueError(f"no {WRITER} and no secret here")) == "no *** and no *** here"
    assert len(engine._words(ValueError("x" * 10_000))) < 1000
    engine.release()


@pytest.mark.parametrize("command", [["query", "rose"], ["build", "corpus.jsonl"]])
def test_commands_tell_no_password(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus.jsonl").write_text('{"text": "rose"}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["trace", *command, "--index", f"http://root:{SECRET}@127.0.0.1:9"]) == 2
    said = "".join(capsys.readouterr())
    assert "http://root:***@127.0.0.1:9" in said
    assert SECRET not in said
