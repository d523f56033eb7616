"""Write text with an artifact: python run.py ARTIFACT "Once upon a time" [options]; --help lists the options."""

import argparse

import ligerexport as lx

parser = argparse.ArgumentParser()
parser.add_argument("artifact")
parser.add_argument("prompt")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
parser.add_argument("--chat", action="store_true", help="send the prompt as a question, with the chat template")
parser.add_argument("--system", help="what the chat begins with")
for name, value in {"temperature": 0.0, "top-k": 0, "top-p": 1.0, "min-p": 0.0}.items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
parser.add_argument("--seed", type=int, help="the same seed writes the same text")
parser.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
parser.add_argument("--prompt-cache", help="file that keeps the state after the beginning of the prompt")
parser.add_argument("--state", help="continue a state that any runtime of the same model has saved")
parser.add_argument("--save-state", help="write the state after the prompt")
options = parser.parse_args()
if options.system and not options.chat:
    parser.error("--system needs --chat")
messages = [{"role": "system", "content": options.system}] if options.system else []
messages.append({"role": "user", "content": options.prompt})
try:
    session = lx.load(options.artifact)
    if options.state:
        session.restore(lx.Snapshot.load(options.state))
    chunks = lx.generate(
        session, None if options.chat else options.prompt, messages=messages if options.chat else None,
        max_new_tokens=options.tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        min_p=options.min_p, seed=options.seed, stop=options.stop, prompt_cache=options.prompt_cache,
        fresh=not options.state,
    )  # fmt: skip
    for index, chunk in enumerate(chunks):
        if options.save_state and index == 0:
            session.snapshot().save(options.save_state)
        print(f"{chunk.token} " if options.ids else chunk.text, end="", flush=True)
    print()
except lx.LigerError as error:
    parser.exit(1, f"error: {error}\n")
