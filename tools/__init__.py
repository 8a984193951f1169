"""Nine tools; each file is one command and one function of the same name."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):  # before any import that older Pythons can't parse
    sys.stderr.write("error: edgepress runs on Python 3.11 to 3.13; this is " + sys.version.split()[0] + "\n")
    sys.exit(2)
