"""Checkpoint files of the original script: conversion into savant_ray checkpoints, and export from them."""
