"""The packages of the wheel; everything else is in pyproject.toml, which cannot combine found with mapped packages."""

from setuptools import find_packages, setup

DATA = {"savant_ray.configs": ["*.yaml"], "savant_ray.reporting.page.assets": ["*"]}  # folders without modules

setup(
    packages=[*find_packages(include=["savant_ray", "savant_ray.*"]), *DATA],
    package_dir={"savant_ray.configs": "configs"},
    package_data=DATA,
)
