"""The variables that are true or false: one reading of all of them."""

import logging

import pytest
import torch

import fastlinear._environment as environment
from fastlinear import FastLinear

WORDS = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
SWITCHES = {
    "FASTLINEAR_DISABLE": (environment.disabled, False),
    "FASTLINEAR_AUTOTUNE": (environment.measures, True),
    "FASTLINEAR_VERBOSE": (environment.verbose, False),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_words(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Eight words mean true or false, in any case; unset and empty mean the default; other words, too, and are told
    once in the log, with what is allowed."""
    read, default = SWITCHES[name]
    monkeypatch.delenv(name, raising=False)
    assert read() is default
    for word, meaning in WORDS.items():
        for spelled in (word, word.upper(), word.capitalize(), f" {word} "):
            monkeypatch.setenv(name, spelled)
            assert read() is meaning
    monkeypatch.setenv(name, "")
    assert read() is default
    assert not caplog.messages
    monkeypatch.setattr(environment, "_complained", set())
    monkeypatch.setenv(name, "perhaps")
    with caplog.at_level(logging.WARNING, "fastlinear"):
        assert read() is read() is default
    (message,) = caplog.messages
    assert name in message and "'perhaps'" in message and all(word in message for word in WORDS)


@pytest.mark.parametrize("word", WORDS)
def test_they_are_obeyed(word: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Each word disables, or does not, tunes, or does not, and prints, or does not."""
    layer, x = FastLinear(16, 24).eval().requires_grad_(False), torch.randn(2, 16)
    monkeypatch.setenv("FASTLINEAR_DISABLE", word)
    layer(x)
    assert (not layer.plans) == WORDS[word]
    monkeypatch.setenv("FASTLINEAR_DISABLE", "no")
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", word)
    monkeypatch.setenv("FASTLINEAR_VERBOSE", word)
    layer(torch.randn(len(word) + 8, 16))
    assert {c.source for c in layer.plans if c.bucket > 2} <= (
        {"tuned", "equal", "cache"} if WORDS[word] else {"heuristic"}
    )
    printed = capfd.readouterr().err
    assert not printed if not WORDS[word] else ("AUTOTUNE" in printed) == (layer.plans[-1].source == "tuned")
