"""Running the notebooks: the ``nla`` command, papermill, several processes, the static site."""
