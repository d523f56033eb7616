"""Print the oldest versions that pyproject.toml allows of what it asks for directly, one `name==version` a line.

    python .ci/oldest.py EXTRA...

An extra that names others of this package includes theirs. Torch is left out: .ci/run says which version of it an
environment has.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = [*map(Requirement, project["dependencies"]), Requirement(f"ligerexport[{','.join(sys.argv[1:])}]")]
for requirement in wanted:  # which grows
    if requirement.name == "ligerexport":
        wanted += [Requirement(x) for extra in requirement.extras for x in project["optional-dependencies"][extra]]
        continue
    (oldest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    if requirement.name != "torch":
        print(f"{requirement.name}=={oldest}")
