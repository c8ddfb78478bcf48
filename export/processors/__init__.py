"""From a checkpoint's tokenizer files to what the runtime reads: ``checkpoint`` is the way in."""
