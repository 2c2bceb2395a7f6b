"""The guard on the hub: pushed, found by its model's name, and never missing by mistake."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from eua import EnergyGuard, EUAError
from eua.guard.guard import GUARD_FILE, find_guard
from tests.hub_stand_in import TOKEN, Hub

KNOWN = {"model_fingerprint": "of a model", "tokenizer_fingerprint": "of a tokenizer", "dtype": "float32"}
GUARD = EnergyGuard(-6.0, 1.0, "No.", (3, 1), (4, 1), 0.05, 100, **KNOWN)
OTHER = replace(GUARD, threshold=-5.0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub, which huggingface_hub uses as if it were the real one."""
    hub = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.close()


@pytest.fixture
def unreachable(hub, monkeypatch):
    """A hub that does not answer."""
    hub.close()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # before a retry
    return hub


def content_of(guard: EnergyGuard, folder: Path) -> bytes:
    guard.save_pretrained(folder)
    return (folder / GUARD_FILE).read_bytes()


@pytest.fixture
def guarded(hub, tmp_path):
    """A model on the hub with a guard, another guard on a branch and in a subfolder, and a model without one."""
    main = {"config.json": b"{}", GUARD_FILE: content_of(GUARD, tmp_path), f"v2/{GUARD_FILE}": content_of(OTHER, tmp_path)}
    hub.files["ann/model"] = {"main": main, "dev": {GUARD_FILE: main[f"v2/{GUARD_FILE}"]}}
    hub.files["ann/plain"] = {"main": {"config.json": b"{}"}}
    (tmp_path / GUARD_FILE).unlink()
    return hub


def test_a_guard_is_read_from_the_hub(guarded, tmp_path):
    assert EnergyGuard.from_pretrained("ann/model") == GUARD
    assert EnergyGuard.from_pretrained("ann/model", revision="dev") == OTHER
    assert EnergyGuard.from_pretrained("ann/model", subfolder="v2") == OTHER
    assert EnergyGuard.from_pretrained("ann/model", cache_dir=tmp_path / "elsewhere") == GUARD
    assert list((tmp_path / "elsewhere").rglob(GUARD_FILE))
    assert all(GUARD_FILE in request for request in guarded.requests if "/resolve/" in request)  # no other file of the model


def test_what_was_downloaded_is_found_offline(guarded, monkeypatch):
    EnergyGuard.from_pretrained("ann/model")
    guarded.close()
    for options in ({"local_files_only": True}, {}):
        assert EnergyGuard.from_pretrained("ann/model", **options) == GUARD
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert EnergyGuard.from_pretrained("ann/model") == find_guard("ann/model") == GUARD


def test_a_private_guard_needs_a_token(guarded):
    guarded.private.add("ann/model")
    with pytest.raises(EUAError, match=r"'ann/model' is not a folder .* no such repository that you may read .*hf auth login"):
        EnergyGuard.from_pretrained("ann/model")
    assert EnergyGuard.from_pretrained("ann/model", token=TOKEN) == find_guard("ann/model", token=TOKEN) == GUARD


def test_a_folder_comes_first(guarded, tmp_path):
    OTHER.save_pretrained(tmp_path / "ann" / "model")
    assert EnergyGuard.from_pretrained("ann/model") == find_guard("ann/model") == OTHER
    GUARD.save_pretrained(tmp_path / "ann" / "model" / "v2")
    assert EnergyGuard.from_pretrained(tmp_path / "ann" / "model", subfolder="v2") == GUARD
    (tmp_path / "ann" / "plain").mkdir()
    with pytest.raises(EUAError, match=r"ann/plain contains no energy_guard\.json: calibrate a guard for this model first"):
        EnergyGuard.from_pretrained("ann/plain")
    assert not guarded.requests


@pytest.mark.parametrize("place", ["./ann/model", "../model", "/ann/model", "ann/models/model", Path("ann/model")])
def test_a_path_is_never_asked_for_on_the_hub(guarded, place):
    with pytest.raises(EUAError, match=r"contains no energy_guard\.json"):
        EnergyGuard.from_pretrained(place)
    assert find_guard(place) is None
    assert not guarded.requests


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "ann/nobody",
            {},
            r"'ann/nobody' is not a folder on this machine, and the hub has no such repository .*check the name",
        ),
        ("ann/plain", {}, r"The repository ann/plain on the hub contains no energy_guard\.json: calibrate a guard"),
        ("ann/model", {"subfolder": "v3"}, r"The repository ann/model on the hub contains no v3/energy_guard\.json: calibrate"),
        ("ann/model", {"revision": "v9"}, r"The repository ann/model on the hub has no revision 'v9': check"),
        (
            "ann/model",
            {"local_files_only": True},
            r"its energy_guard\.json was not downloaded .*downloads are turned off: calibrate",
        ),
    ],
)
def test_what_the_hub_lacks_is_reported(guarded, name, options, text):
    with pytest.raises(EUAError, match=text):
        EnergyGuard.from_pretrained(name, **options)


def test_a_file_instead_of_its_folder(tmp_path):
    GUARD.save_pretrained(tmp_path)
    with pytest.raises(EUAError, match="is a file, but a folder or a repository .* is expected: pass the file's folder"):
        EnergyGuard.from_pretrained(str(tmp_path / GUARD_FILE))


def test_a_file_on_the_hub_that_is_no_guard(guarded):
    guarded.files["ann/model"]["main"][GUARD_FILE] = b'{"threshold": 1}'
    for read in (EnergyGuard.from_pretrained, find_guard):
        with pytest.raises(EUAError, match="is not a guard"):
            read("ann/model")


def test_a_command_finds_the_guard_of_its_model(guarded, tmp_path, monkeypatch):
    assert find_guard("ann/model") == GUARD
    assert find_guard("ann/model", revision="dev") == OTHER
    assert find_guard("ann/plain") is None
    OTHER.save_pretrained(tmp_path / "other")
    for named in ("other", tmp_path / "other"):
        assert find_guard("ann/model", named) == OTHER
    assert find_guard("ann/plain", "ann/model") == GUARD
    with pytest.raises(EUAError, match="ann/plain on the hub contains no"):
        find_guard("ann/model", "ann/plain")  # a named guard must exist
    with pytest.raises(EUAError, match="no such repository"):
        find_guard("ann/nobody")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_guard("ann/never-downloaded") is None


def test_the_server_takes_the_guard_of_its_model(guarded, monkeypatch):
    server = pytest.importorskip("eua.serving.server")
    monkeypatch.setattr(server, "load_model", lambda name: ("model", "tokenizer"))
    taken = []

    def engine(model, tokenizer, guard, **options):
        taken.append(guard)
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "Engine", engine)
    options = dict.fromkeys(("max_batch", "queue", "max_prompt_tokens", "max_tokens", "api_key"))
    for model, guard, no_guard in (("ann/model", None, False), ("ann/plain", "ann/model", False), ("ann/plain", None, True)):
        with pytest.raises(KeyboardInterrupt):
            server.run_serve(Namespace(model=model, guard=guard, no_guard=no_guard, **options))
    assert taken == [GUARD, GUARD, None]
    with pytest.raises(EUAError, match="ann/plain on the hub contains no"):
        server.run_serve(Namespace(model="ann/plain", guard=None, no_guard=False, **options))
    assert len(taken) == 3


def test_a_bad_connection_is_not_taken_for_a_model_without_a_guard(unreachable):
    for read in (EnergyGuard.from_pretrained, find_guard):
        with pytest.raises(EUAError, match=r"the hub cannot be reached to look for its .*HF_HUB_OFFLINE=1"):
            read("ann/model")


def test_a_hub_that_fails_is_not_taken_for_a_model_without_a_guard(guarded, monkeypatch):
    monkeypatch.setattr("eua.guard.hub.hf_hub_download", lambda *args, **options: 1 / 0)
    with pytest.raises(EUAError, match=r"cannot be downloaded from the hub \(division by zero\): check the connection"):
        find_guard("ann/model")


def test_a_guard_is_pushed_alone_and_read_back(hub):
    commit = GUARD.push_to_hub("ann/new", private=True, token=TOKEN)
    assert commit.commit_url.startswith(hub.address)
    assert hub.files == {"ann/new": {"main": {GUARD_FILE: hub.files["ann/new"]["main"][GUARD_FILE]}}}
    assert hub.private == {"ann/new"}
    assert hub.messages == ["Upload energy_guard.json"]
    assert json.loads(hub.files["ann/new"]["main"][GUARD_FILE])["promise"] == GUARD.promise
    assert EnergyGuard.from_pretrained("ann/new", token=TOKEN) == GUARD


def test_a_guard_is_pushed_into_its_models_repository(guarded):
    OTHER.push_to_hub("ann/plain", token=TOKEN, revision="guarded", commit_message="A guard for 5 %")
    assert set(guarded.files["ann/plain"]["guarded"]) == {"config.json", GUARD_FILE}
    assert set(guarded.files["ann/plain"]["main"]) == {"config.json"}
    assert guarded.messages == ["A guard for 5 %"]
    assert "ann/plain" not in guarded.private
    assert EnergyGuard.from_pretrained("ann/plain", revision="guarded") == OTHER


def test_a_failed_push_is_reported(hub):
    with pytest.raises(
        EUAError, match=r"energy_guard\.json cannot be uploaded to 'ann/new' \(.*401.*\): check the name, .*log"
    ):
        GUARD.push_to_hub("ann/new")
    with pytest.raises(EUAError, match=r"cannot be uploaded to 'ann/of/new' "):
        GUARD.push_to_hub("ann/of/new", token=TOKEN)
    assert not hub.files
