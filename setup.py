"""Package metadata comes from settings.ini, as in every nbdev project."""
from configparser import ConfigParser
from pathlib import Path

import setuptools

config = ConfigParser()
config.read(Path(__file__).parent/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setuptools.setup(
    name=cfg["lib_name"], version=cfg["version"], license="Apache-2.0",
    description=cfg["description"], keywords=cfg["keywords"], url=cfg["git_url"],
    author=cfg["author"], author_email=cfg["author_email"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    packages=setuptools.find_packages(include=["mmqlora*"]), python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(), extras_require={k: cfg[f"{k}_requirements"].split() for k in ("dev", "gpu")},
    entry_points={"console_scripts": [cfg["console_scripts"]]}, zip_safe=False,
)
