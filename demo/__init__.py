"""How the two demo models that ship with chatglm are made: data, training, evaluation."""
