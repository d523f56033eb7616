"""Write text with an artifact: python run.py ARTIFACT "Once upon a time" [--tokens N] [--ids] [--state FILE]."""

import argparse

import ligerexport as lx

parser = argparse.ArgumentParser()
parser.add_argument("artifact")
parser.add_argument("prompt")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
parser.add_argument("--state", help="continue a state that any runtime of the same model has saved")
options = parser.parse_args()
session = lx.load(options.artifact)
if options.state:
    session.restore(lx.Snapshot.load(options.state))
for chunk in lx.generate(session, options.prompt, max_new_tokens=options.tokens, fresh=not options.state):
    print(f"{chunk.token} " if options.ids else chunk.text, end="", flush=True)
print()
