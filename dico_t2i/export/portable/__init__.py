"""What an exported folder holds as code: the network and the pipeline as classes of diffusers.

``dico_t2i.export.inline`` copies them, with all that they use of this package, into files that need only diffusers,
transformers and torch. Nothing is imported here: writing a folder does not wait for diffusers.
"""
