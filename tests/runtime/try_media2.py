import json, sys, time, traceback
from pathlib import Path
import torch, pytest
from tests.runtime import media_models as mm
from seqbuild.build import build

@pytest.mark.parametrize("family", list(mm.FAMILIES))
def test_try(family, tmp_path, byte_tokenizer_dir):
    d = mm.save(family, byte_tokenizer_dir, tmp_path / "m")
    t=time.time()
    r = build(d, out=tmp_path/"art")
    print(family, time.time()-t, r.manifest.is_portable, r.manifest.target_patterns, len(r.manifest.subgraphs), r.remarks)
    for e in r.manifest.inputs: print("  ", e)
    print(r.manifest.dims, r.manifest.conditions, r.manifest.decoder)
