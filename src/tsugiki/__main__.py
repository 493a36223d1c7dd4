"""`python -m tsugiki`: the CLI, and the supervised child that must die with its parent."""

from tsugiki import supervise

if supervise.is_worker():
    supervise.become_worker()

from tsugiki.cli import main

main()
