"""``python -m ringfence.cli`` is the ``ringfence`` command."""

from ringfence.cli.app import main

if __name__ == "__main__":
    main()
