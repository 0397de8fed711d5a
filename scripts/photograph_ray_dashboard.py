"""Take the picture of Ray's dashboard in docs/, while a run goes on; needs Chromium.

    fedsim run --output runs/main &
    python scripts/photograph_ray_dashboard.py http://127.0.0.1:8265/#/actors docs/ray_dashboard.png

The dashboard asks for a token. A browser gives it as a cookie, which the page sets once the token was typed in; here it
is set beforehand, through Chromium's DevTools protocol.
"""

import argparse
import asyncio
import base64
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

COOKIE = "ray-authentication-token"
SIZE = (1500, 750)
SECONDS = 20.0  # until the page has asked for its data and drawn it


async def photograph(url: str, token: str, chromium: str) -> bytes:
    """Open a page of the dashboard and return it as PNG."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        browser = await asyncio.create_subprocess_exec(chromium, *options, "about:blank", stderr=subprocess.DEVNULL)
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            while not port_file.is_file():
                await asyncio.sleep(0.1)
            address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}/json/list"
            async with aiohttp.ClientSession() as session:
                async with session.get(address) as answer:
                    (page,) = [item for item in await answer.json() if item["type"] == "page"]
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    return await _photograph(socket, url, token)
        finally:
            browser.terminate()
            await browser.wait()


async def _photograph(socket: aiohttp.ClientWebSocketResponse, url: str, token: str) -> bytes:
    async def call(number: int, method: str, **params: Any) -> dict[str, Any]:
        await socket.send_json({"id": number, "method": method, "params": params})
        while (answer := await socket.receive_json()).get("id") != number:
            pass
        return dict(answer["result"])

    await call(1, "Network.setCookie", name=COOKIE, value=token, url=url.partition("#")[0])
    width, height = SIZE
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    await call(2, "Emulation.setDeviceMetricsOverride", **screen)
    await call(3, "Page.navigate", url=url)
    await asyncio.sleep(SECONDS)
    shot = await call(4, "Page.captureScreenshot", format="png")
    return base64.b64decode(shot["data"])


def main() -> None:
    """Read the arguments, ask Ray for the token, write the picture."""
    parser = argparse.ArgumentParser(description="Take a picture of a page of Ray's dashboard.")
    parser.add_argument("url")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is not installed (Debian: apt-get install chromium)")
    ray = Path(sys.executable).with_name("ray")
    shown = subprocess.run([ray, "get-auth-token"], capture_output=True, text=True, check=True).stdout
    options.output.write_bytes(asyncio.run(photograph(options.url, shown.split()[-1], chromium)))


if __name__ == "__main__":
    main()
