# A sandbox is there to have things installed into it: without this, pip refuses outside of a virtual environment.
rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
