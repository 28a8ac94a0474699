"""`python -m studylib` is the command `study`."""

from studylib.cli import main

raise SystemExit(main())
