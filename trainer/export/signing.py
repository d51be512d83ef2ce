"""Sign a bundle with a key of one's own, and check that: hashes tell damage, only a signature tells a forger.

    nestling sign BUNDLE --key KEY
    nestling check-signature BUNDLE --public-key KEY

The signature (model.sig in the bundle) covers every other file. It is in the format of OpenSSF Model Signing, so that
`model_signing verify key` reads it as well. Nothing of a bundle is run, and no network is used.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_signing import hashing, signing, verifying

from launch.errors import CheckFailed, UserError, exit_code
from launch.files import new_file
from trainer.export.encoder import first_line
from trainer.export.publish import require_whole
from trainer.export.verify import SIGNATURE

PASSWORD = "NESTLING_KEY_PASSWORD"  # environment variable with the password of an encrypted private key


def sign(folder: Path, key: Path) -> None:
    """Write model.sig into a bundle that verifies, in place of an older one.

    `key` is a PEM file with a private key on the curve P-256, P-384 or P-521. Raises UserError for another one and
    CheckFailed for a bundle that does not verify.
    """
    password = os.environ.get(PASSWORD)
    use: Any = signing.Config().use_elliptic_key_signer
    signer = _with_key(lambda: use(private_key=key, password=password.encode() if password else None), key)
    require_whole(folder)
    with new_file(folder / SIGNATURE) as partial:
        signer.set_hashing_config(_all_files()).sign(folder, partial)


def check_signature(folder: Path, public_key: Path) -> None:
    """Raise CheckFailed unless the owner of `public_key` (PEM) signed the bundle as it lies there, file by file."""
    verifier = _with_key(lambda: verifying.Config().use_elliptic_key_verifier(public_key=public_key), public_key)
    path = folder / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise CheckFailed(f"{path}: missing, so nobody vouches for this bundle; get a signed one")
    try:
        verifier.set_hashing_config(_all_files()).verify(folder, path)
    except Exception as error:  # of the package, of cryptography, of JSON
        # It hands over the repr of a list of reprs of digests; the file's name is what helps.
        reason = re.sub(r"[\\\[\]\"']", "", first_line(error).partition(": Expected")[0])
        raise CheckFailed(f"{folder}: the signature does not hold: {reason}; do not use the bundle") from None


def _all_files() -> hashing.Config:
    # By default files of git are left out, which anybody could then add.
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _with_key(load: Callable[[], Any], path: Path) -> Any:
    try:
        return load()
    except Exception as error:  # each kind of wrong key has an exception of its own
        raise UserError(
            f"{path}: cannot be used as key: {first_line(error)}; allowed: PEM on curve P-256, P-384 or P-521, as "
            f"`openssl ecparam -name prime256v1 -genkey -noout` makes it; {PASSWORD} holds its password"
        ) from None


def main(argv: Sequence[str]) -> int:
    """`sign` or `check-signature`, and what it works on."""
    parser = argparse.ArgumentParser(prog="nestling")
    verbs = parser.add_subparsers(dest="verb", required=True)
    signs = verbs.add_parser("sign", description="Sign a bundle with a private key.")
    signs.add_argument("--key", type=Path, required=True, help=f"private key, PEM; {PASSWORD} holds its password")
    checks = verbs.add_parser("check-signature", description="Check who signed a bundle.")
    checks.add_argument("--public-key", type=Path, required=True, help="public key, PEM, from a source you trust")
    for verb in (signs, checks):
        verb.add_argument("folder", type=Path, metavar="BUNDLE")
    arguments = parser.parse_args(argv)
    if arguments.verb == "sign":
        sign(arguments.folder, arguments.key)
        print(f"signed: {arguments.folder / SIGNATURE}")
    else:
        check_signature(arguments.folder, arguments.public_key)
        print(f"signature holds for every file; next: nestling verify {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
