#!/usr/bin/env bash
# Record docs/images/terminal.svg: `run` and `bench` in a terminal, as they run on this machine.
#
#   benchmarks/screencast.sh ENGINE ORIGINAL docs/images/terminal.svg
#
# ENGINE is an artifact and ORIGINAL what it is compared with. The script needs ligerexport, asciinema
# (pip install asciinema==2.4.0) and npx, which fetches svg-term-cli. Pauses are cut to
# half a second.
set -euo pipefail

say() {
  printf '\e[32m$\e[0m '
  for word in $1; do
    printf '%s ' "$word"
    sleep 0.1
  done
  printf '\n'
  eval "$1"
  sleep 2
}

if [[ $1 == --play ]]; then
  say 'ligerexport run engine --chat "Why is the sky blue?" -n 64'
  say 'ligerexport bench engine --against original --context 256,2048 --blocks 2 > bench.md'
  exit
fi

place=$(mktemp -d)
trap 'rm -r "$place"' EXIT
script=$(realpath "$0")
output=$(realpath "$3")
ln -s "$(realpath "$1")" "$place/engine"
ln -s "$(realpath "$2")" "$place/original"
cd "$place"
asciinema rec --quiet --idle-time-limit 0.5 --cols 92 --rows 24 --command "bash '$script' --play" cast
python3 - <<'END' # one frame for what came within 0.4 s keeps the picture small
import json

head, *events = map(json.loads, open("cast"))
frames = []
for at, kind, text in events:
    if frames and at - frames[-1][0] < 0.4:
        frames[-1][2] += text
    else:
        frames.append([at, kind, text])
open("cast", "w").write("\n".join(map(json.dumps, [head, *frames])))
END
npx --yes svg-term-cli@2.1.1 --in cast --out "$output" --window --no-cursor
