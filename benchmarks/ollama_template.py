"""`python -m benchmarks.ollama_template`: our Modelfile templates, run by Go itself.

Ollama renders its templates with Go's text/template. Each chat format of the tests, sprout's, and
those of three real tokenizers is written as a Modelfile; Go renders fifty conversations with the
template in it, and the tokens must be those of our own chat format. Needs `go` on the PATH.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import gguf_converter, record
from tsugiki.data.chat import ChatFormat
from tsugiki.exporting.ollama import conversations, modelfile, read_wording, stop_texts
from tsugiki.models.hub import ResolvedModel
from tsugiki.models.load import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from go_template import collate
from test_exporting_ollama import CHATS

PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type job struct {
	Template string
	Data     []map[string]any
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	found := [][]string{}
	for _, one := range jobs {
		made := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		texts := []string{}
		for _, data := range one.Data {
			var out strings.Builder
			if err := made.Execute(&out, data); err != nil {
				panic(err)
			}
			texts = append(texts, out.String())
		}
		found = append(found, texts)
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		panic(err)
	}
}
"""


def run_go(jobs: list[dict[str, object]]) -> list[list[str]]:
    """Each job's template over each of its data, by Go."""
    go = shutil.which("go")
    if go is None:
        raise SystemExit("Go is needed on the PATH for this proof (golang-go in Debian)")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "main.go"
        source.write_text(PROGRAM)
        done = subprocess.run(
            [go, "run", str(source)], input=json.dumps(jobs), capture_output=True, text=True,
            check=True,
        )  # fmt: skip
    found: list[list[str]] = json.loads(done.stdout)
    return found


def main() -> bool:
    """Every format; write the figures."""
    place = gguf_converter.place_of(sys.argv[1:])
    gguf_converter.fetch_tokenizers(place)
    chats = dict(CHATS)
    for name in gguf_converter.TOKENIZERS:
        folder = place / "tokenizers" / name
        chats[name] = ChatFormat.of(load_tokenizer(ResolvedModel(folder, name)))
    talks, jobs, asked, refused = conversations(), [], [], {}
    for name, chat in chats.items():
        wording, remark = read_wording(chat)
        if wording is None:
            refused[name] = remark
            continue
        text = modelfile("./x.gguf", wording, stop_texts(chat))
        template = re.search(r'TEMPLATE """(.*?)"""\n', text, re.DOTALL)
        assert template is not None
        data = [collate([(m.role, m.content) for m in talk]) for talk in talks]
        jobs.append({"Template": template.group(1), "Data": data})
        asked.append(name)
    unlike = []
    for name, texts in zip(asked, run_go(jobs), strict=True):
        chat = chats[name]
        bos = chat.tokenizer.bos_token if chat.starts_with_bos else ""
        for talk, text in zip(talks, texts, strict=True):
            if chat.encode(bos + text) != chat.prompt_ids(talk):
                unlike.append(f"{name}: {talk[-1].content[:30]!r}")
    for line in [*unlike, *(f"{name}: {why}" for name, why in refused.items())]:
        print(line)
    figures = {
        "formats": float(len(chats)),
        "formats without such a template": float(len(refused)),
        "conversations": float(len(talks) * len(asked)),
        "conversations rendered otherwise": float(len(unlike)),
    }
    bounds = {
        "conversations rendered otherwise": "== 0",
        "formats without such a template": "== 0",
        "formats": f">= {len(CHATS) + 3}",
    }
    return record.write(
        "ollama_template", "python -m benchmarks.ollama_template", figures, bounds,
        formats=list(chats), refused=refused,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
