"""What tools/dev and tools/token share: local settings, the development secret, and tokens signed with it."""
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCAL = ROOT / ".inkstone"  # git-ignored


def dev_vars() -> dict:
    """The names and values of .dev.vars, which wrangler reads by itself."""
    try:
        text = (ROOT / ".dev.vars").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    line = re.compile(r"""^[ \t]*(?:export[ \t]+)?(\w+)[ \t]*=[ \t]*(?:"([^"]*)"|'([^']*)'|`([^`]*)`|([^\s#]*))""", re.MULTILINE)
    return {name: next((value for value in values if value), "") for name, *values in line.findall(text)}


def jwt_secret() -> str:
    """The HS256 key of this checkout: the environment's, .dev.vars', or a random one made once for local runs."""
    given = os.environ.get("JWT_SECRET") or dev_vars().get("JWT_SECRET")
    if given:
        return given
    file = LOCAL / "dev.json"
    LOCAL.mkdir(exist_ok=True)
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            json.dump({"jwtSecret": secrets.token_urlsafe(48)}, new)
    except FileExistsError:
        pass
    return json.loads(file.read_text())["jwtSecret"]


def token(user: str, role: str, days: float) -> str:
    """A JWT that the local Worker accepts."""
    now = int(time.time())
    claims = {"user_id": user, "roles": [role], "iat": now, "exp": now + int(days * 86400)}
    for claim, name in (("iss", "JWT_ISSUER"), ("aud", "JWT_AUDIENCE")):
        value = os.environ.get(name) or dev_vars().get(name)
        if value:
            claims[claim] = value

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    parts = [encode(json.dumps(part, separators=(",", ":")).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    signed = ".".join(parts)
    return f"{signed}.{encode(hmac.new(jwt_secret().encode(), signed.encode(), hashlib.sha256).digest())}"
