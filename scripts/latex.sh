#!/usr/bin/env bash
# Installs LaTeX where it is missing and we may; elsewhere says in one line what to install.
set -euo pipefail
packages="texlive-latex-recommended texlive-latex-extra texlive-publishers texlive-fonts-recommended texlive-science latexmk poppler-utils"

if command -v pdflatex latexmk pdftotext >/dev/null && kpsewhich IEEEtran.cls algorithm.sty >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "mmqlora: LaTeX is missing. Install it, on Debian or Ubuntu: sudo apt-get install $packages" >&2
  exit 1
fi
echo "== LaTeX: apt-get install (about a minute)"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086
apt-get install -q -y --no-install-recommends $packages
