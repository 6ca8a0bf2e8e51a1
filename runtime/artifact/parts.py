"""The parts of a checked artifact other than its subgraphs: manifest, companions, constants, the model's own code."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.artifact.manifest import Manifest
from runtime.artifact.own_code import ModelCode, is_own_module
from runtime.host.publish import disk_errors

if TYPE_CHECKING:
    import torch

    from runtime.artifact.own_code_import import LoadedCode
    from runtime.language.program import Program


@dataclass(kw_only=True)
class ArtifactParts:
    """The contents of a checked artifact other than its chain of subgraphs.

    Attributes:
        path: the artifact's directory.
        manifest: its table of contents.
        leaf_programs: programs of leaves that define their own computation, by file.
        constants: tensors that the artifact contains, by name.
        model_code: the files of the model's own code; None for a model that is part of transformers.
        code: the same code, ready to be imported, if allowed.
        companions: config, tokenizer and similar files by name, as read when their digests were compared.
    """

    path: Path
    manifest: Manifest
    leaf_programs: dict[str, Program] = field(default_factory=dict, repr=False)
    constants: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    model_code: ModelCode | None = field(default=None, repr=False)
    code: LoadedCode | None = field(default=None, repr=False)
    companions: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    _private: Path | None = field(default=None, repr=False)

    @property
    def companions_path(self) -> Path:
        """A private directory with the companions, for libraries that read files themselves: the artifact's own
        directory may have changed since it was checked.
        """
        if self._private is None:
            private = Path(tempfile.mkdtemp(prefix="seqbuild-"))
            weakref.finalize(self, shutil.rmtree, private, ignore_errors=True)
            with disk_errors(private, lambda: "TMPDIR selects another directory for temporary files"):
                for name, data in self.companions.items():
                    (private / name).write_bytes(data)
            self._private = private
        return self._private

    @property
    def config_class(self) -> type | None:
        """Return the class of the model's config if its own code defines it; None if transformers does.

        Raises:
            ModelError: when the code cannot be executed.
        """
        from transformers import PretrainedConfig

        entry = self.manifest.model
        if not is_own_module(entry.config_module):
            return None
        self.require_consent()
        assert self.code is not None, "a config class of a model without code"
        return self.code.find(entry.config_module, entry.config_class_name, PretrainedConfig)

    def run_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of a run: the given one, or the model's own for None."""
        import torch

        own: torch.dtype = getattr(torch, self.manifest.model.dtype)
        return own if dtype is None else dtype

    def require_consent(self) -> None:
        """Reject running the model's own code without consent; a model without own code needs none.

        Raises:
            ModelError: naming the code that would be executed.
        """
        if self.model_code is not None and self.code is None:
            model = self.manifest.model
            named = {model.config_module: model.config_class_name, model.module: model.class_name}
            own = {module: name for module, name in named.items() if is_own_module(module)}
            raise self.model_code.refusal(str(self.path), own.values(), own)
