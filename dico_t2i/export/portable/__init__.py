"""The code of an exported folder: the network and the pipeline as classes of diffusers.

``dico_t2i.export.inline`` copies them, with everything that they use from this package, into files that need only
diffusers, transformers and torch. Nothing is imported here, so that an export does not wait for diffusers.
"""
