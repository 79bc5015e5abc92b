#!/bin/sh
# Run notebooks from top to bottom, each in a kernel of its own; `make notebooks` and `make figures` call this.
#   run_notebooks.sh FOLDER NOTEBOOK…       executed copies and their HTML go to FOLDER
#   run_notebooks.sh --in-place NOTEBOOK…   a notebook is replaced by its executed copy, once that ran to its end
# Exit status: 0 if all ran to their end and have their page, else 1.
set -u
python=${PYTHON:-python3}
folder=$1
shift
out=$folder
if [ "$folder" = --in-place ]; then out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT; fi
# No version of Python and no time stamps in the file: they would change with every rendering.
plain='import sys, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
notebook.metadata.language_info.pop("version", None)
nbformat.write(notebook, sys.argv[1])'

"$python" -c 'from pdl_utils.settings import get_profile; print("profile: %s (%s)" % get_profile())' || exit 1
number=0
failed=
for notebook in "$@"; do
  name=$(basename "$notebook" .ipynb)
  number=$((number + 1))
  began=$(date +%s)
  printf '[%d/%d] %s … ' "$number" "$#" "$name"
  if "$python" -m nbconvert --log-level=ERROR --execute --ExecutePreprocessor.record_timing=False \
    --to notebook --output-dir "$out" "$notebook" &&
    "$python" -c "$plain" "$out/$name.ipynb" &&
    if [ "$folder" = --in-place ]; then
      mv "$out/$name.ipynb" "$notebook"
    else
      "$python" "$(dirname "$0")/pages.py" "$out" "$out/$name.ipynb"
    fi
  then
    echo "ok in $(($(date +%s) - began)) s"
  else
    echo "$name failed after $(($(date +%s) - began)) s"
    failed="$failed $name"
  fi
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
