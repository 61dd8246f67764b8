"""The subcommands of ``dico`` that have rooms of their own."""
