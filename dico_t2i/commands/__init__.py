"""The larger subcommands of ``dico``, each in its own module."""
