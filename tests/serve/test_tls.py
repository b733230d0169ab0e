"""TLS as the settings say; a client without a certificate is not let in where one is due."""

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from support.serving import DEADLINE, started

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")


def make(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@needs_openssl
def test_clients_show_a_certificate(encoder: Path, tmp_path: Path) -> None:
    certificate, key = make(tmp_path, "server")
    own, own_key = make(tmp_path, "client")
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    with started(f"tiny={encoder}", *flags, "--tls-client-ca", str(own)) as server:
        assert server.url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(verify=trust, timeout=DEADLINE) as nobody, pytest.raises(httpx.HTTPError):
            nobody.get(f"{server.url}/livez")
        trust.load_cert_chain(own, own_key)
        with httpx.Client(verify=trust, timeout=DEADLINE) as client:
            assert client.get(f"{server.url}/livez").status_code == 200
