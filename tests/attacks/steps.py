"""Attacks by what programs call whole: functions of transformers, and modules."""

from __future__ import annotations

from tests.attacks.attack import Attack, program

_OPAQUE = "transformers.models.llama.modeling_llama"
_LLAVA, _SPEECH = (
    "transformers.models.llava.modeling_llava",
    "transformers.models.granite_speech.modeling_granite_speech",
)
_FEATURES = f"{_LLAVA}:LlavaModel.get_image_features"


def step(
    name: str, reason: str, path: str, arguments: str, *before: str, objects: tuple[str, ...] = ("part",)
) -> Attack:
    """A call of an opaque step with these arguments."""
    return program(name, reason, *before, f'y = run.opaque["{path}"]({arguments})', opaque=(path,), objects=objects)


_PART = 'self.get_submodule("part")'

STEPS = [
    step(
        "foreign code by generate",
        "the keyword 'custom_generate', which is not in the signature",
        f"{_SPEECH}:GraniteSpeechForConditionalGeneration.generate",
        'self.get_submodule(""), custom_generate="/tmp/evil", trust_remote_code=True',
        objects=("",),
    ),
    step(
        "foreign code by generate, unnamed keywords",
        "the keyword 'custom_generate', which is not in the signature",
        f"{_SPEECH}:GraniteSpeechForConditionalGeneration.generate",
        f"{_PART}, custom_generate=x, trust_remote_code=True",
    ),
    *(
        step(
            f"generate of {owner}",
            "no forward of the model's code calls it",
            f"transformers.models.{owner}.generate",
            _PART,
        )
        for owner in (
            "granite_speech.modeling_granite_speech:GraniteSpeechForConditionalGeneration",
            "musicgen.modeling_musicgen:MusicgenForConditionalGeneration",
            "bark.modeling_bark:BarkModel",
            "rag.modeling_rag:RagTokenForGeneration",
            "blip_2.modeling_blip_2:Blip2ForConditionalGeneration",
        )
    ),
    *(
        step(f"inherited {name}", "defines no such function", f"{_OPAQUE}:LlamaForCausalLM.{name}", _PART)
        for name in ("generate", "from_pretrained", "save_pretrained", "push_to_hub", "load_adapter", "set_use_kernels")
    ),
    *(
        step(f"the library's {path}", f"opaque step '{path}'", path, "x")
        for path in (
            "transformers.modeling_utils:PreTrainedModel.save_pretrained",
            "transformers.utils.hub:cached_file",
            "transformers.generation.utils:GenerationMixin.load_custom_generate",
            "transformers.integrations.hub_kernels:load_and_register_attn_kernel",
            "transformers.integrations.hub_kernels:get_kernel",
            "transformers.model_debugging_utils:model_addition_debugger_context",
            "transformers.models.auto.modeling_auto:AutoModel.from_pretrained",
            "transformers.models.auto.auto_factory:_BaseAutoModelClass.from_config",
            "transformers.modeling_layers:GenericForSequenceClassification.__init__",
        )
    ),
    step(
        "a constructor that loads",
        "no forward of the model's code calls it",
        "transformers.models.encoder_decoder.modeling_encoder_decoder:EncoderDecoderModel.from_encoder_decoder_pretrained",
        "x",
        objects=(),
    ),
    step(
        "a class, which would be made",
        "defines no such function",
        f"{_OPAQUE}:LlamaForCausalLM",
        f"{_PART}.config",
        objects=("part.config",),
    ),
    step("the whole model", "the whole model as an argument", _FEATURES, 'self.get_submodule(""), x', objects=("",)),
    step(
        "the whole model by a name",
        "the whole model as an argument",
        _FEATURES,
        "a, x",
        'a = self.get_submodule("")',
        objects=("",),
    ),
    step("a module as data", "a module anywhere but", _FEATURES, f"{_PART}, {_PART}"),
    step("a module as a keyword", "a module anywhere but", _FEATURES, f"{_PART}, pixel_values={_PART}"),
    step("a module in a tuple", "a module or config anywhere but", _FEATURES, f"({_PART},), x"),
    step(
        "text for a step",
        "the string '/etc/passwd' as an opaque step's argument",
        _FEATURES,
        f'{_PART}, x, "/etc/passwd"',
    ),
    step(
        "text in a tuple", "the string 'default' as an opaque step's argument", _FEATURES, f'{_PART}, x, ("default",)'
    ),
    step(
        "a word that the step does not know",
        "the string 'original_full' as an opaque step's argument",
        _FEATURES,
        f'{_PART}, x, vision_feature_select_strategy="original_full"',
    ),
    step(
        "keywords in a table",
        "the string 'debug_io' as an opaque step's argument",
        _FEATURES,
        f'{_PART}, x, {{"debug_io": True}}',
    ),
    step("a keyword that no signature names", "the keyword 'debug_io'", _FEATURES, f"{_PART}, x, debug_io=True"),
    step("a flag with a value", "the keyword 'output_attentions'", _FEATURES, f"{_PART}, x, output_attentions=x"),
    step("more arguments than there are", "positional arguments", _FEATURES, f"{_PART}, {', '.join('x' * 9)}"),
]

MODULES = [
    program("the whole model, called", "a call of the whole model", 'y = self.get_submodule("")(x)', submodules=("",)),
    program(
        "files for what a module computes",
        "the keyword 'debug_io'",
        'y = self.get_submodule("part")(x, debug_io=True, debug_io_dir="owned")',
        submodules=("part",),
    ),
    program(
        "files, by a table",
        "the string 'debug_io' as a module's argument",
        'y = self.get_submodule("part")(x, {"debug_io": True})',
        submodules=("part",),
    ),
    program(
        "files, by a table that is copied",
        "the string 'debug_io'",
        'a = run.copied({"debug_io": True})',
        'y = self.get_submodule("part")(x, a)',
        submodules=("part",),
    ),
    program(
        "a path for a module",
        "the string '/etc/passwd'",
        'y = self.get_submodule("part")("/etc/passwd")',
        submodules=("part",),
    ),
]
