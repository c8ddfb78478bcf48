"""A checkpoint's tokenizer, image processor and generation config, read as the objects of bundle.json."""
