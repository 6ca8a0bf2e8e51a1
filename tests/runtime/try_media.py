import json, sys, time, traceback
from pathlib import Path
import torch, pytest
from tests.runtime import media_models as mm
from runtime.data.documents import read_documents
from runtime.data.processor import load_processor

@pytest.mark.parametrize("family", list(mm.FAMILIES))
def test_try(family, tmp_path, byte_tokenizer_dir):
    d = mm.save(family, byte_tokenizer_dir, tmp_path / "m")
    print(family, sorted(p.name for p in d.iterdir()))
    mm.write_image(tmp_path / "a.png", 90, 60); mm.write_image(tmp_path / "b.jpg", 60, 130)
    mm.write_sound(tmp_path / "a.wav", 0.7); mm.write_sound(tmp_path / "b.wav", 0.4, 8000)
    if family == "whisper":
        rows = [{"audio": "a.wav", "text": "hello"}, {"audio": "b.wav", "text": "so"}]
    else:
        k, f = ("audio", ("a.wav", "b.wav")) if family == "qwen2_audio" else ("image", ("a.png", "b.jpg"))
        rows = [{"messages": [{"role": "user", "content": [{"type": k, k: f[0]}, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "a cat"}]},
         {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "hi"}]},
         {k: f[1], "text": "describe"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    docs = list(read_documents(tmp_path / "rows.jsonl"))
    p = load_processor(d)
    print(p.names, p.media_tokens, p.padding_token)
    for doc in docs:
        s = p.sample(doc, 2048)
        print({n: (tuple(v.shape), v.dtype) for n, v in s.items()})
        name = "input_ids" if "input_ids" in s else "labels"
        print(repr(p.tokenizer.decode(s[name][0])[:300]))
    print("joinable", p.is_joinable(docs[0]))
