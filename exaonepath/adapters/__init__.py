"""The encoders in the forms that other libraries expect: TRIDENT, LazySlide, timm and transformers' pipelines.

A file a library. None of them is needed to import this package or to build an adapter, except where a function
registers something with a library: it then says what to install. Numbers are those of `encode_slide`, bit for bit, for
the same pixels in the same batches.
"""
