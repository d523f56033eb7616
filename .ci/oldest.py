"""Print the oldest versions that pyproject.toml allows of what it asks for directly, one `name==version` a line.

    python .ci/oldest.py EXTRA...

Torch is left out: .ci/run says which version of it an environment has.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = [
    *project["dependencies"],
    *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]),
]
for requirement in map(Requirement, wanted):
    (oldest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    if requirement.name != "torch":
        print(f"{requirement.name}=={oldest}")
