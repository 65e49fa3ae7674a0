"""How fast our quantized layers are, beside llama.cpp and chatglm.cpp; README.md says how to run and read it."""
