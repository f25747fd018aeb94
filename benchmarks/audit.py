"""Says which packages of requirements.lock have known vulnerabilities, as pip-audit finds them.

    make audit

Where no network leads to the databases it says so, and that nothing is known. Ends with 1 for a finding.
"""

import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Asks and prints; a line a finding."""
    lock = Path(__file__).parents[1] / "requirements.lock"
    options = ["--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off", "--timeout=20"]
    command = [sys.executable, "-m", "pip_audit", f"--requirement={lock}", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        sys.exit(print(f"audit: nothing is known: pip-audit could not ask ({last[:200]})"))
    left = [package["name"] for package in packages if "skip_reason" in package]
    found = [package for package in packages if package.get("vulns")]
    for package in found:
        for one in package["vulns"]:
            mended = ", ".join(one["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {one['id']}, mended in {mended}")
    print(
        f"audit: {len(packages) - len(left)} of {len(packages)} packages were asked about, "
        f"{len(found)} have known vulnerabilities; nothing is known of {len(left)}"
        + (", whose database this network does not lead to" if left else "")
    )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
