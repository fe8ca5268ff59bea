"""TransformerLens architectures of ours, one vision-language family a file, found through the package's entry points.

`build_bridge_from_module(model, "Qwen2VLForConditionalGeneration", ...)` knows them wherever steer_plugin is installed.
"""
