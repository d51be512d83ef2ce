"""Signatures of bundles: checked by us, by model_signing's own command, and by openssl alone."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from launch.errors import exit_code
from launch.files import sha256_of
from trainer.export import signing, verify

ROOT = Path(__file__).parent.parent


def new_key(folder: Path, name: str, private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> tuple[Path, Path]:
    """Files of a private key and of its public one."""
    key, public = folder / name, folder / f"{name}.pub"
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return key, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return new_key(tmp_path_factory.mktemp("keys"), "key", ec.generate_private_key(ec.SECP256R1()))


def command(*words: str | Path) -> tuple[int, str, str]:
    """The command in a process of its own."""
    words = (sys.executable, "-m", "launch.cli", *map(str, words))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def nestling(*words: str | Path) -> tuple[int, str, str]:
    """The same without a process of its own, which takes a second."""
    main = verify.main if words[0] == "verify" else signing.main
    arguments = [str(word) for word in words if word != "verify"]
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as errors:
        code = exit_code(main, arguments)
    return code, said.getvalue(), errors.getvalue()


def refused(answer: tuple[int, str, str], code: int, *words: str) -> None:
    """One line on stderr that holds all `words`."""
    assert answer[0] == code and answer[2].count("\n") == 1, answer
    assert answer[2].startswith("nestling: ") and all(word in answer[2] for word in words), answer[2]


@pytest.fixture(scope="module")
def signed(tiny_bundle: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("signed") / "bundle"))
    answer = command("sign", bundle, "--key", keys[0])
    assert answer == (0, f"signed: {bundle}/model.sig\n", "")
    return bundle


def test_the_signer_s_key_holds_and_the_bundle_still_verifies(signed: Path, keys: tuple[Path, Path]):
    code, said, _ = command("check-signature", signed, "--public-key", keys[1])
    assert code == 0 and said.startswith("signature holds for every file")
    assert command("verify", signed)[0] == 0
    # Signing again replaces the file.
    assert nestling("sign", signed, "--key", keys[0])[0] == 0
    assert nestling("check-signature", signed, "--public-key", keys[1])[0] == 0
    assert nestling("verify", signed)[0] == 0


def test_openssl_alone_confirms_the_signature_of_every_file(signed: Path, keys: tuple[Path, Path], tmp_path: Path):
    envelope = json.loads((signed / "model.sig").read_text())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"]
    (tmp_path / "signed").write_bytes(f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload)
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    check = ["openssl", "dgst", "-sha256", "-verify", keys[1], "-signature", "signature", "signed"]
    assert b"Verified OK" in subprocess.run(check, cwd=tmp_path, capture_output=True, check=True).stdout
    stated = {entry["name"]: entry["digest"] for entry in json.loads(payload)["predicate"]["resources"]}
    files = [path for path in signed.rglob("*") if path.is_file() and path.name != "model.sig"]
    assert stated == {path.relative_to(signed).as_posix(): sha256_of(path) for path in files}


def test_the_command_of_model_signing_reads_it(signed: Path, keys: tuple[Path, Path]):
    words = ["-m", "model_signing", "verify", "key", signed, "--signature", signed / "model.sig"]
    done = subprocess.run([sys.executable, *words, "--public_key", keys[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_key_does_not_hold(signed: Path, tmp_path: Path):
    _, other = new_key(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    refused(command("check-signature", signed, "--public-key", other), 3, "the signature does not hold", "Key")
    # A forger says that the signature was made with the key that is checked.
    content = json.loads((signed / "model.sig").read_text())
    hint = content["verificationMaterial"]["publicKey"]
    before = (signed / "model.sig").read_text()
    for changed in ({"hint": sha256_of(other)}, {}):
        hint.clear()
        hint.update(changed)
        (signed / "model.sig").write_text(json.dumps(content))
        refused(nestling("check-signature", signed, "--public-key", other), 3, "does not hold")
    (signed / "model.sig").write_text(before)


CHANGES = ["changed", "added", "removed", "git file", "linked", "resealed"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_that_is_not_the_signed_one_is_refused(signed: Path, keys: tuple[Path, Path], change: str):
    path = signed / {"added": "more.txt", "git file": ".gitattributes", "resealed": "manifest.json"}.get(
        change, "config.json"
    )
    before = path.read_bytes() if path.exists() else None
    seal = (signed / "manifest.sha256").read_text()
    if change in ("removed", "linked"):
        path.unlink()
    if change == "linked":
        path.symlink_to(signed / "modules.json")
    elif change != "removed":
        path.write_bytes((before or b"") + b" ")
    if change == "resealed":  # what hashes cannot tell
        (signed / "manifest.sha256").write_text(f"{sha256_of(path)}  manifest.json\n")
        assert nestling("verify", signed)[0] == 0
    try:
        if change == "changed":
            answer = nestling("check-signature", signed, "--public-key", keys[1])
            assert answer[2].endswith(
                "hold: Signature mismatch: Hash mismatch for config.json; do not use the bundle\n"
            )
        words = ["the signature does not hold", signed.name if change == "linked" else path.name]
        refused(nestling("check-signature", signed, "--public-key", keys[1]), 3, *words)
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        (signed / "manifest.sha256").write_text(seal)
    assert nestling("check-signature", signed, "--public-key", keys[1])[0] == 0


SIGNATURES = ["missing", "pipe", "link", "", "[]", "{}", '{"verificationMaterial": 3}', "\ud800", "[" * 100_000]


@pytest.mark.parametrize("content", SIGNATURES, ids=lambda content: ascii(content)[:20])
def test_what_is_no_signature_is_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path, content: str):
    path = signed / "model.sig"
    before = path.read_bytes()
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content == "link":
        (tmp_path / "moved").write_bytes(before)
        path.symlink_to(tmp_path / "moved")
    elif content != "missing":
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        refused(nestling("check-signature", signed, "--public-key", keys[1]), 3, str(signed))
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(before)


def test_keys_that_cannot_be_used_are_named(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    unfit, public = new_key(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    encrypted = tmp_path / "encrypted"
    encrypt = ["openssl", "ec", "-in", keys[0], "-aes256", "-passout", "pass:word", "-out", encrypted]
    subprocess.run(encrypt, check=True, capture_output=True)
    before = (signed / "model.sig").read_bytes()
    allowed = "allowed: PEM on curve P-256, P-384 or P-521"
    for key in (unfit, tmp_path / "absent", keys[1], encrypted):
        refused(nestling("sign", signed, "--key", key), 2, f"{key}: cannot be used as key", allowed)
    monkeypatch.setenv("NESTLING_KEY_PASSWORD", "no")
    refused(nestling("sign", signed, "--key", encrypted), 2, str(encrypted), allowed)
    monkeypatch.setenv("NESTLING_KEY_PASSWORD", "word")
    for key in (public, tmp_path / "absent", keys[0]):
        refused(nestling("check-signature", signed, "--public-key", key), 2, f"{key}: cannot be used as key", allowed)
    assert (signed / "model.sig").read_bytes() == before
    assert nestling("sign", signed, "--key", encrypted)[0] == 0
    assert nestling("check-signature", signed, "--public-key", keys[1])[0] == 0


def test_a_bundle_that_does_not_verify_is_not_signed(keys: tuple[Path, Path], tmp_path: Path):
    answer = nestling("sign", tmp_path, "--key", keys[0])
    refused(answer, 3, "manifest.json: cannot be read")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["sign", "B", "--key", "K"], ["check-signature", "B", "--public-key", "K"]])
def test_without_the_extra_one_line_names_it(words: Sequence[str]):
    program = (
        "import sys; sys.modules['model_signing'] = None; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)
    refused((done.returncode, done.stdout, done.stderr), 2, 'pip install "nestling[sign]"', f"nestling {words[0]}")
